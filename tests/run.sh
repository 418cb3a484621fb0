#!/bin/sh
# The whole suite on two cores: the model's tests and then a service that is killed as a whole, beside
# the others' tests and then the other end-to-end tests. Arguments go to pytest. Called by `make test`.
set -u
mkdir -p out
failed=0
pytest() { "${PYTHON:-python}" -m pytest "$@"; }

{
  beside_failed=0
  pytest "$@" tests/wan_model || beside_failed=1
  pytest "$@" tests/e2e/test_all_killed.py || beside_failed=1
  exit $beside_failed
} >out/tests-beside.log 2>&1 &
beside=$!
pytest "$@" tests/test_*.py tests/benchmarks tests/serve_app tests/cluster || failed=1
pytest "$@" tests/e2e --ignore tests/e2e/test_all_killed.py || failed=1
wait $beside || failed=1
cat out/tests-beside.log
exit $failed
