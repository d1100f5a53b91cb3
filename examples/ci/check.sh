#!/bin/sh
# For any CI: sh check.sh TARGET...
# Fails on findings that are not in the baseline (1), and on what could not be checked (2). The report stays as
# buffer-lifting.sarif for whatever shows SARIF; the findings are in the log.
set -u
baseline=${BUFFER_LIFTING_BASELINE:-buffer-lifting-baseline.json}
if [ -f "$baseline" ]; then
    set -- "$@" --baseline "$baseline"
fi
buffer-lifting check "$@" --format sarif > buffer-lifting.sarif 2> /dev/null
[ -s buffer-lifting.sarif ] || rm -f buffer-lifting.sarif # no report of a usage error
exec buffer-lifting check "$@" --format text --statistics
