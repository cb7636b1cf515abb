"use strict";

// Pages: the overview, or the one run that the address names. Without this script all of them stand one below the other.
function turn() {
  const name = decodeURIComponent(location.hash.slice(1));
  const place = name ? document.getElementById(name) : null;
  const run = place && place.classList.contains("run") ? place : null;
  document.querySelectorAll(".run.shown").forEach((page) => page.classList.remove("shown"));
  document.body.classList.add("paged");
  document.body.classList.toggle("on-run", run !== null);
  if (run) run.classList.add("shown");
  if (place) place.scrollIntoView();
}

// Tables: a click on a title sorts by that column, a second one the other way round; empty cells stay last.
function sortBy(header) {
  const table = header.closest("table");
  const column = [...header.parentElement.children].indexOf(header);
  const falling = header.getAttribute("aria-sort") ? header.getAttribute("aria-sort") === "ascending" : header.classList.contains("number");
  const key = (row) => row.children[column].dataset.value;
  const number = header.classList.contains("number");
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    const order = number ? Number(x) - Number(y) : x.localeCompare(y);
    return falling ? -order : order;
  });
  table.tBodies[0].append(...rows);
  table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
  header.setAttribute("aria-sort", falling ? "descending" : "ascending");
}

document.querySelectorAll(".sortable th button").forEach((button) => button.addEventListener("click", () => sortBy(button.parentElement)));
addEventListener("hashchange", turn);
turn();
