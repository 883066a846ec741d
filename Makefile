# The only entry point. Each target does its own set-up, see tests/setup.sh.

# The distribution's, which the plugins run under; the first python3 on PATH may be one of pyenv or conda.
PYTHON ?= /usr/bin/python3
export PYTHON
# Debian keeps ip, tc and nft there, which are not on an ordinary user's PATH.
export PATH := $(PATH):/usr/sbin:/sbin

SHELL_SCRIPTS = $(wildcard .ci/run *.sh */*.sh */*/*.sh)
FAULT_TESTS = tests/faults tests/e2e/test_healing.py tests/e2e/test_kubernetes.py tests/integration/test_add_faults.py
# Test files at once, see tests/lanes.py. Most of the time they wait, so more than there are processors; LANES=1 for one after another.
LANES = 4
NEED_ROOT = test "$$(id -u)" = 0 || { echo "needs root: sudo make $@" >&2; exit 1; }

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo lab lab-down cluster cluster-down test kubernetes test-cluster test-faults soak test-runtimes test-docs test-matrix test-vm \
	bench bench-agent lint golden record clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'More words for the command behind demo, lab, test, test-cluster, test-faults, soak, test-runtimes, test-docs, test-matrix, test-vm: ARGS="...", for example  make test ARGS="-k lease -x"'

demo: ## two nodes and four pods on this machine: pings over WireGuard, and proof that nothing goes in clear (root)
	@$(NEED_ROOT)
	@tests/setup.sh demo
	@$(PYTHON) deploy/lab.py demo $(ARGS)

lab: ## the same nodes and pods, left running for you to look around (root)
	@$(NEED_ROOT)
	@tests/setup.sh demo
	@$(PYTHON) deploy/lab.py up $(ARGS)
	@echo
	@echo 'The lab is up. As root:'
	@echo '  deploy/lab.py status                       what runs'
	@echo '  deploy/lab.py ping                         every pod to every pod'
	@echo '  deploy/lab.py exec NODE -- ip route        a command on a node'
	@echo '  deploy/lab.py exec NODE/POD -- ip address  a command in a pod'
	@echo '  deploy/lab.py runtime add NODE/web         one more pod, as kubelet has a container runtime make it'
	@echo '  make lab-down                              remove it'

lab-down: ## remove the lab (root)
	@$(NEED_ROOT)
	@$(PYTHON) deploy/lab.py down $(ARGS)

cluster: ## a real Kubernetes of three nodes on this machine, with MNCNI; PROXY=nftables FAMILIES=46 KUBERNETES_VERSION=1.33 (root; go; 15 minutes)
	@$(NEED_ROOT)
	@tests/setup.sh cluster
	@deploy/cluster/build.sh cluster
	@$(PYTHON) deploy/cluster/cluster.py up $(ARGS)

cluster-down: ## remove the cluster, not what was built for it (root)
	@$(NEED_ROOT)
	@$(PYTHON) deploy/cluster/cluster.py down

test: ## all tests, four files at once; as an ordinary user those that need no root (5 minutes)
	@tests/setup.sh test
	@.venv/bin/python -m pytest --lanes $(LANES) $(ARGS)

kubernetes: ## a real kube-apiserver, etcd, kubectl and a policy engine for tests, some of which are left out without them (needs go; 10 minutes)
	@deploy/cluster/build.sh apiserver

test-cluster: ## tests on the cluster, which is made if there is none, and Kubernetes' own e2e tests; ARGS="-k conformance" (root; go; 40 minutes)
	@$(NEED_ROOT)
	@tests/setup.sh cluster
	@deploy/cluster/build.sh e2e
	@.venv/bin/python -m pytest tests/cluster $(ARGS)

test-faults: ## what faults cost, as one table: crashes, storms, traffic through faults, hostile input (root; 25 minutes)
	@$(NEED_ROOT)
	@tests/setup.sh test
	@.venv/bin/python -m pytest --lanes $(LANES) $(FAULT_TESTS) $(ARGS)

soak: ## an hour of pods, nodes and agents that come and go; exit status 1 if anything grows; ARGS="--minutes 3" (root)
	@$(NEED_ROOT)
	@tests/setup.sh test
	@.venv/bin/python -m tests.faults.soak $(ARGS)

test-runtimes: ## tests under real container runtimes: containerd by ctr and by CRI, podman (root; installs them)
	@$(NEED_ROOT)
	@tests/setup.sh runtimes
	@.venv/bin/python -m pytest tests/runtimes $(ARGS)

test-docs: ## every command block of the documents that can run here, in a lab of its own (root)
	@$(NEED_ROOT)
	@tests/setup.sh test
	@.venv/bin/python -m pytest tests/docs $(ARGS)

test-matrix: ## make test on Debian 11, 12, 13 and sid: Python 3.9, 3.11, 3.13, 3.14 with their ip, nft, wg; ARGS="bookworm" for one (root)
	@$(NEED_ROOT)
	@tests/setup.sh matrix
	@tests/matrix.sh $(ARGS)

test-vm: ## in a virtual machine, with Debian's kernel: what a kernel may lack (netem), and the lab over the kernel's WireGuard (root)
	@$(NEED_ROOT)
	@tests/setup.sh vm
	@tests/vm.sh $(ARGS)

bench: ## what a pod costs, against the reference plugins and the floor, as ratios; exit status 1 above a budget (root)
	@$(NEED_ROOT)
	@tests/setup.sh test
	@$(PYTHON) -m tests.bench.bench $(ARGS)

bench-agent: ## what an agent costs in clusters of 100, 1,000 and 5,000 nodes: CPU, memory, requests, bytes
	@tests/setup.sh venv
	@.venv/bin/python -m tests.bench.bench_agent $(ARGS)

lint: ## ruff on the Python files, shellcheck on the shell scripts
	@tests/setup.sh lint
	@.venv/bin/python -m ruff check --no-cache .
	@if command -v shellcheck >/dev/null; then shellcheck $(SHELL_SCRIPTS); else echo 'shellcheck: left out, not installed'; fi

golden: ## rewrite the expected parts of tests/cases, or of CASE=name alone, and show what changed
	@tests/setup.sh venv
	@.venv/bin/python -m tests.golden --update $(CASE)

record: ## record the replies in tests/cases, or of CASE=name alone, from this machine's kernel (root)
	@$(NEED_ROOT)
	@tests/setup.sh test
	@.venv/bin/python -m tests.golden --record $(CASE)

clean: ## remove .venv and caches
	@rm -rf .venv .pytest_cache .ruff_cache
	@find . -name .git -prune -o -type d -name __pycache__ -exec rm -rf {} +
