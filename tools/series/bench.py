# SPDX-License-Identifier: GPL-2.0
"""`make bench`: what the same ioctls cost on our driver and on mainline's, in instructions.

One CPU in QEMU, whose time stamp counter counts instructions: the figures are those of the kernel's
code, not of the machine that it is measured on. QEMU counts each round of a `rep` instruction. The
kernel is that of `make x86`, with DEBUG_VM, so that there is no other to build. The last figures are
committed, in bench-figures; one of ours that gets worse fails, as does one that is too far from the C
driver's."""

import os

import x86
from common import HERE, Failure, logfile, read, say, write
from x86 import MAINLINE, NODE, OURS

FIGURES = os.path.join(HERE, "bench-figures")
HEADER = """\
# Instructions per page of 4 KiB; made by `make bench UPDATE=1`.
# %-28s %10s %10s
"""
# A nanosecond is an instruction; time that the CPU is idle for passes at once.
ICOUNT = ["-accel", "tcg", "-icount", "shift=0,sleep=off", "-cpu", "max,la57=off"]
LIMITS = {                  # how many times the figure of the C driver
    "cold device read": 1.2,
    "warm device read": 1.2,
    "to device": 1.2,
    "to RAM": 1.2,
    "CPU read-back": 1.2,
    "cold device read, THP": 1.2,
    "warm device read, THP": 1.2,
    "to device, THP": 1.0,
    "to RAM, THP": 1.0,
    "CPU read-back, THP": 1.0,
}
WORSE = 1.03
GPU = "/dev/dummy_gpu0"
STAGE = 3600                # seconds on one driver, by the clock of the machine that counts
# A CPU keeps as many free pages for itself as by default, unlike in the other boots.
WORDS = "kunit.enable=0", "sysctl.vm.percpu_pagelist_high_fraction=0"


def measure(kernels, kernel):
    """{row: (ours, the C driver's, or 0 for what it does not do)}, of both drivers in one boot."""
    program = "/host" + kernels.static("bench", "-I%s/lib" % kernels.src, "-idirafter%s/include/uapi" % kernels.src)
    args = [str(STAGE), "/host" + x86.module(kernels, kernel, OURS), NODE, program, NODE, GPU,
            "--", "-/host" + x86.module(kernels, kernel, MAINLINE), NODE, program, NODE]
    out = logfile("bench-output")
    with open(out, "wb") as f:
        status = x86.boot(kernels, kernel, kernels.static("stages"), "bench", args, driver=None, extra=WORDS, out=f,
                          err=f, timeout=x86.TIMEOUT, accel=ICOUNT, cpus=1)
    if status:
        raise Failure("it ended with status %d" % status, out)
    figures, driver = {OURS: {}, MAINLINE: {}}, None
    for line in read(out).splitlines():
        word, _, rest = line.partition(" ")
        if word == "==" and rest in figures:
            driver = rest
        elif word == "figure":
            count, _, row = rest.partition(" ")
            figures[driver][row] = int(count)
    if not LIMITS.keys() <= figures[MAINLINE].keys() <= figures[OURS].keys():
        raise Failure("there are rows without a figure", out)
    before, _, _ = read(logfile("bench")).partition("== %s\n" % MAINLINE)
    if x86.warnings(before):
        raise Failure("with %s: %s" % (OURS, x86.warnings(before)[0]), logfile("bench"))
    return {row: (count, figures[MAINLINE].get(row, 0)) for row, count in figures[OURS].items()}


def committed():
    if not os.path.exists(FIGURES):
        return {}
    lines = [l.rsplit(None, 2) for l in read(FIGURES).splitlines() if not l.startswith("#")]
    return {row: (int(ours), int(theirs)) for row, ours, theirs in lines}


def table(figures):
    return "".join("%-30s %10d %10d\n" % (row, *pair) for row, pair in figures.items())


def verdict(row, pair, last):
    """"PASS", or what is wrong with the figures of a row."""
    ours, theirs = pair
    before = last[0] if last else ours
    if ours > before * WORSE:
        return "takes %d instructions, %.1f %% more than the %d of bench-figures" % (
            ours, (ours / before - 1) * 100, before)
    if row in LIMITS and ours > theirs * LIMITS[row]:
        return "is %.2f times %s; the limit is %.1f" % (ours / theirs, MAINLINE, LIMITS[row])
    return "PASS" if last else "is not in bench-figures: make bench UPDATE=1"


def bench(tally, kernels, update):
    kernel = figures = None
    with tally.test("bench: the kernel builds"):
        kernel = x86.build(kernels)
    if not kernel:
        return
    with tally.test("bench: %s and then %s" % (OURS, MAINLINE)):
        figures = measure(kernels, kernel)
    if not figures:
        return
    if update:
        write(FIGURES, HEADER % ("row", OURS, MAINLINE) + table(figures))
    last = committed()
    say("    %-30s %10s %10s %6s %6s" % ("instructions per page", OURS, MAINLINE, "ratio", "limit"))
    for row, (ours, theirs) in figures.items():
        ratio = "%.2f" % (ours / theirs) if theirs else "-"
        say("    %-30s %10d %10s %6s %6s" % (row, ours, theirs or "-", ratio, LIMITS.get(row, "-")))
    for row, pair in figures.items():
        tally.add("bench: " + row, verdict(row, pair, last.get(row)))
    for row in last.keys() - figures.keys():
        tally.add("bench: " + row, "is in bench-figures, and was not measured")
    better = [row for row, (ours, _) in figures.items() if row in last and ours * WORSE < last[row][0]]
    if better:
        say("    better than in bench-figures: %s; update with make bench UPDATE=1" % ", ".join(better))
