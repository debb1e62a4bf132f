#!/usr/bin/env bash
# Take a picture of a report: scripts/screenshot.sh REPORT.html OUT.png [WIDTH [HEIGHT]]
# CHROMIUM=path/to/chrome names the browser; else the first one found is used.  SCHEME=dark: as a dark desktop shows it.
set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
WIDTH=${3:-1000} HEIGHT=${4:-1900}
BROWSER=${CHROMIUM:-$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)}
if [ -z "$BROWSER" ]; then
  echo "no chromium, chromium-browser or google-chrome on PATH; install one (apt-get install chromium), or set CHROMIUM" >&2
  exit 1
fi
FLAGS=(--headless=new --disable-gpu --hide-scrollbars "--window-size=$WIDTH,$HEIGHT" "--screenshot=$2")
# Light is 1, dark is 0.
FLAGS+=("--blink-settings=preferredColorScheme=$([ "${SCHEME:-light}" = dark ] && echo 0 || echo 1)")
if [ "$(id -u)" = 0 ]; then
  FLAGS+=(--no-sandbox) # Chromium's sandbox refuses root
fi
REPORT=$(realpath -e "$1")
# The browser complains of what it does not need; it is heard only where there is no picture.
if ! LOG=$("$BROWSER" "${FLAGS[@]}" "file://$REPORT" 2>&1) || [ ! -s "$2" ]; then
  echo "$LOG" >&2
  exit 1
fi
echo "$2: $WIDTH x $HEIGHT"
