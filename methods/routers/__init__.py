"""Routers, one file each, found by their `kind`: options plus the equation of one decision."""
