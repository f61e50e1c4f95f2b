# The project's commands; `just` alone lists them. Uses .venv when there is one, else what is on PATH.

set positional-arguments

export PATH := justfile_directory() / ".venv/bin" + ":" + env("PATH")

_default:
    @just --list --unsorted

# Everything fast that must hold before a commit: format, lint, types, layers, unit tests
check: lint
    pytest tests/unit -q

# Format, lint, types and layers
lint:
    ruff format --check .
    ruff check .
    mypy
    lint-imports

# Repairs what a machine can: format, and the lint rules that know their own mend
fix:
    ruff format .
    ruff check --fix .

# The default suite: unit, behaviour and contract tests, on two cores
test *args:
    pytest -n 2 -m "not e2e" "$@"

# The router's hot modules by mypyc, beside their sources, as every wheel has them; forty seconds
compile:
    python deploy/compile_router.py

# Back to the sources alone
uncompile:
    python deploy/compile_router.py --remove

# What concerns the router, with its hot modules compiled
test-compiled *args: compile && uncompile
    pytest -n 2 -m "not e2e" tests/unit/router tests/behaviour/router "$@"

# The whole program with real processes; slower
test-e2e *args:
    pytest tests/e2e -m "e2e and not vllm and not skypilot" "$@"

# Two real vLLM engines with a real small model; 3 GB, kept in $DETOSERVE_TEST_CACHE
test-vllm *args:
    pytest tests/e2e/real -m vllm -s "$@"

# A Slurm cluster and SkyPilot's API server on this machine, as root (tests/e2e/lab/README.md)
lab-up:
    python -m tests.e2e.lab up

# Ends the lab, and all that runs in it
lab-down:
    python -m tests.e2e.lab down

# From commits to services on real SkyPilot; in the lab that is up, else in one of its own
test-skypilot *args:
    pytest tests/e2e/lab -m skypilot -s "$@"

# Suites written by others, against our router; downloaded once (pip, npm) to $DETOSERVE_TEST_CACHE
test-suites *args:
    pytest tests/e2e/test_openai_suite.py tests/e2e/test_schemathesis.py -m e2e -s "$@"

# OpenAI's own client tests; $DETOSERVE_OPENAI_OPENAPI may name the OpenAPI file the mock answers by
test-openai-suite *args:
    pytest tests/e2e/test_openai_suite.py -m e2e -s "$@"

# Prints README's figures as Markdown tables, in some three minutes; asserts nothing about time
bench:
    python tests/bench/bench_push.py
    python tests/bench/bench_passes.py
    python tests/bench/bench_core.py
    python tests/bench/bench_limits.py

# The router, compiled, beside the SGLang router and vllm-router (PyPI, kept in $DETOSERVE_TEST_CACHE), in some eight minutes
bench-router *args: compile && uncompile
    python tests/bench/bench_router.py "$@"

# Whether workers add up, each with the same part of a core (needs a control group that may be written)
bench-workers *args: compile && uncompile
    python tests/bench/bench_workers.py "$@"

# Where routers send what, beside the same peers, over any trace in Mooncake's format; half an hour, --quick three minutes
bench-routing *args: compile && uncompile
    python tests/bench/bench_routing.py "$@"

# Everything on this machine, from a copy of the example config repo
demo *args:
    detoserve up "$@"

# Writes what is generated from the models: JSON Schemas and docs/kinds.md
schemas:
    python -m schemas.json_schema example-config-repo/.schemas
    python -m schemas.reference docs/kinds.md
