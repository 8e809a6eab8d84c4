# SPDX-License-Identifier: GPL-2.0
# `make` lists the targets. The work is done by tools/series/series.

MAKEFLAGS += --no-print-directory
export KERNEL_TREE JOBS TREE FILE RUN ARGS TIMEOUT DRIVER KVM DEBUG SAMPLE MM UPDATE

.PHONY: help demo test uml x86 tree refresh check bisect mutants debug bench configs clean
help demo test uml x86 tree refresh check bisect mutants debug bench configs clean:
	@tools/series/series $@

.DEFAULT_GOAL := help
