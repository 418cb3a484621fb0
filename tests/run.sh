#!/bin/sh
# The whole suite on two cores: what needs the service's long-lived cluster, and beside it the rest
# and a service that is killed as a whole. Arguments go to pytest. Called by `make test`.
set -u
mkdir -p out
failed=0
pytest() { "${PYTHON:-python}" -m pytest "$@"; }

{
  beside_failed=0
  pytest "$@" tests/wan_model || beside_failed=1
  pytest "$@" tests/e2e/test_all_killed.py || beside_failed=1
  pytest "$@" tests/benchmarks tests/cluster || beside_failed=1
  exit $beside_failed
} >out/tests-beside.log 2>&1 &
beside=$!
pytest "$@" tests/test_*.py tests/serve_app || failed=1
pytest "$@" tests/e2e --ignore tests/e2e/test_all_killed.py || failed=1
wait $beside || failed=1
cat out/tests-beside.log
exit $failed
