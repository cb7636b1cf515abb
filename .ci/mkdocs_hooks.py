"""What the documentation takes from the folders: a method's page is in the navigation, and its line in the
table of methods, because the file is there."""

from pathlib import Path

import yaml

MARK = "<!-- methods -->"


def on_config(config):
    """Every page of docs/methods after its index."""
    (section,) = (entry for entry in config.nav if isinstance(entry, dict) and "Methods" in entry)
    pages = sorted(file.name for file in Path(config.docs_dir, "methods").glob("*.md"))
    section["Methods"] += [f"methods/{name}" for name in pages if name != "index.md"]
    return config


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri != "methods/index.md":
        return markdown
    rows = ["| method | what | paper |", "|---|---|---|"]
    folder = Path(config.config_file_path).parent / "conf" / "method"
    for file in sorted(folder.glob("*.yaml")):
        method = yaml.safe_load(file.read_text(encoding="utf-8"))
        paper = method.get("paper", "")
        link = f"[{paper}](https://arxiv.org/abs/{paper})" if paper else ""
        rows.append(f"| [{file.stem}]({file.stem}.md) | {method.get('about', '')} | {link} |")
    return markdown.replace(MARK, "\n".join(rows))


def on_page_content(html, page, config, files):
    """A bar in a table's code is written `\\|`, as other readers of Markdown want it."""
    return html.replace("\\|", "|")
