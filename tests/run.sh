#!/bin/sh
# The whole suite on two cores: the model's tests beside the others', then a service that is killed as
# a whole beside the one of the other end-to-end tests. Arguments go to pytest. Called by `make test`.
set -u
mkdir -p out
failed=0
pytest() { "${PYTHON:-python}" -m pytest "$@" || failed=1; }
beside() { "${PYTHON:-python}" -m pytest "$@" >out/tests-beside.log 2>&1 & }
beside_done() { wait $! || failed=1; cat out/tests-beside.log; }

beside "$@" tests/wan_model
pytest "$@" tests/test_*.py tests/benchmarks tests/serve_app tests/cluster
beside_done
beside "$@" tests/e2e/test_all_killed.py
pytest "$@" tests/e2e --ignore tests/e2e/test_all_killed.py
beside_done
exit $failed
