# The two commands: `make demo` shows the main job, `make test` proves everything. Both set the machine up first.
.PHONY: demo test unit setup build bench clean

demo: setup
	cargo build --release --workspace --bins
	target/release/isthmus sandbox demo

test: setup
	scripts/test all

# No root, no etcd, no BPF toolchain.
unit:
	scripts/test unit

setup:
	scripts/setup

build:
	cargo build --release --workspace --bins

# For example: make bench NAME=failover
bench: setup
	cargo xtask bench $(NAME)

clean:
	cargo clean
