#!/usr/bin/env bash
# Build the documentation to see that it can be: a link that leads nowhere is an error.  `mkdocs serve` is to read it.
# Not --quiet, by which mkdocs does not count warnings either.
set -euo pipefail
SITE=$(mktemp -d)
trap 'rm -r "$SITE"' EXIT
NO_MKDOCS_2_WARNING=1 mkdocs build --strict --site-dir "$SITE"
