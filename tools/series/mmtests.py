# SPDX-License-Identifier: GPL-2.0
"""Mainline's tests of mm, tools/testing/selftests/mm, unmodified: each as it is, and linked with the object of
the series that keeps moving a program's memory to the GPU and back. The results have to be the same."""

import concurrent.futures
import contextlib
import fnmatch
import os
import re
import time

from common import HERE, JOBS, Failure, logfile, read, run, say

MM = "tools/testing/selftests/mm"
MOVER = "dummy_gpu_mover.o"
LIST = "mm-differences"
LIMIT = 240         # seconds for a program
REPEAT = 2          # a program whose memory moves runs again until it has had so many seconds ..
TIMES = 10          # .. but not more often than this
TIMEOUT = 1500      # for the boot: in UML it takes 3 minutes on an idle machine, on x86_64 11

# What runs, as it is called here: a program and its arguments. uffd-unit-tests ends at the first error, so its
# tests run by name. Those of migration take 20 s each; these are the two whose memory is private.
COMMANDS = {name: [name] for name in (
    "cow", "mremap_test", "merge", "madv_populate", "mlock2-tests", "mseal_test", "process_madv", "rmap",
    "ksm_functional_tests", "mremap_dontunmap", "guard-regions", "soft-dirty", "pagemap_ioctl")}
COMMANDS.update({"uffd-" + name: ["uffd-unit-tests", "-f", name] for name in (
    "register", "zeropage", "move", "wp", "minor", "sigbus", "events", "poison", "mmap")})
COMMANDS["migration"] = ["migration", "-t", "private_anon", "-t", "private_anon_thp"]


def build(kernels):
    """The directories of the programs as they are, and with the mover. The selftests of the series are there."""
    mover = os.path.join(kernels.dir("selftests"), MOVER)
    made = []
    for name, flags in (("plain", "-static"), ("moved", "-static " + mover)):
        out = os.path.join(kernels.dir("mm-tests"), name)
        os.makedirs(out, exist_ok=True)
        programs = sorted({os.path.join(out, command[0]) for command in COMMANDS.values()})
        for path in programs:
            # make does not know that this one is linked with the mover.
            if name == "moved" and os.path.exists(path) and os.path.getmtime(path) < os.path.getmtime(mover):
                os.unlink(path)
        run(["make", "-j" + JOBS, "-C", os.path.join(kernels.src, MM), "OUTPUT=" + out, "LDFLAGS=" + flags,
             "KHDR_INCLUDES=-isystem %s/usr/include" % kernels.dir("headers")] + kernels.tc.make + programs,
            "build-mm-tests", env=kernels.tc.env, what="the build of mainline's mm tests")
        made.append(out)
    return made


class Run:
    """One run of a program: how it ended, and its results by number."""

    def __init__(self, text, end):
        m = re.match(r"(.*), (\d+) (\d+) pages, ([\d.]+) s$", end)
        self.end = m.group(1) if m else end
        self.pages = (int(m.group(2)), int(m.group(3))) if m else (0, 0)
        self.seconds = float(m.group(4)) if m else 0
        self.results = {}
        for not_ok, number, name, directive, why in re.findall(
                r"^(not )?ok (\d+)(?: -)? ?(.*?)(?: ?# ?(SKIP|XFAIL|XPASS|TODO)\b ?(.*))?$", text, re.M):
            status = directive or ("FAIL" if not_ok else "PASS")
            self.results[number] = status, name or why
        # vm_util.c looks at a page in two ways and ends the program if they differ: the page moved in between.
        self.torn = "Bail out! read and ioctl return unmatched results" in text
        if not self.torn:
            self.results["end"] = self.end, ""

    def of(self, number, otherwise=("NO RESULT", "")):
        return self.results.get(number, otherwise)


def parse(output):
    """{program: {"plain" or "moved": [Run]}} in the output of turns.c."""
    runs = {}
    parts = re.split(r"^== ([\w-]+)/(plain|moved)\r?\n", output, flags=re.M)
    for program, variant, text in zip(parts[1::3], parts[2::3], parts[3::3]):
        text, _, end = text.partition("\n== ")
        runs.setdefault(program, {}).setdefault(variant, []).append(
            Run(text.replace("\r", ""), end.strip() or "the kernel went down"))
    return runs


class Allowed:
    """What may differ, as LIST says it: where, what runs, the test, when, and the reason."""

    WHEN = ("always", "sometimes", "may-skip", "skips")

    def __init__(self, tier):
        self.lines = []
        for line in read("%s/%s" % (HERE, LIST)).splitlines():
            if not line or line.startswith("#"):
                continue
            where, command, test, when, reason = line.split(None, 4)
            if command not in COMMANDS or when not in self.WHEN:
                raise Failure("%s: %s" % (LIST, line))
            if fnmatch.fnmatch(tier, where):
                self.lines.append((command, test, when, reason))
        self.used = set()

    def reason(self, command, number, want=("", ""), got=("", "")):
        """Why a test may differ; without results: why all may be skipped."""
        for line in self.lines:
            when = ("always", "sometimes", "may-skip") if want[0] else ("skips",)
            if line[0] == command and line[2] in when and (line[2] != "may-skip" or got[0] == "SKIP") and \
               (fnmatch.fnmatch(number, line[1]) or fnmatch.fnmatch(want[1], line[1])):
                self.used.add(line)
                return line[3]
        return None

    def unused(self):
        return [l for l in self.lines if l[2] in ("always", "skips") and l not in self.used]


def compare(tally, tier, program, runs, allowed):
    """Each result of each run that moved with that of the one that did not."""
    plain, moved = runs.get("plain", []), runs.get("moved", [])
    where = "%s:mm:%s" % (tier, program)
    if len(plain) != 1 or all(r.torn for r in moved):
        tally.add(where, "NO RESULT")
        return
    plain = plain[0]
    pages = [sum(r.pages[i] for r in moved) for i in (0, 1)]
    skips = sum(status == "SKIP" for status, _ in plain.results.values())
    say("    %-22s %4d results, %3d skips, %5.1f s; %2d times in %5.1f s with %8d pages to the device, %8d back" % (
        program, len(plain.results) - 1, skips, plain.seconds, len(moved), sum(r.seconds for r in moved), *pages))
    if not all(pages):
        tally.add(where + ": nothing moved", "FAIL")
    if not re.match("exit [0-9]+$", plain.end):
        tally.add("%s: %s" % (where, plain.end), "FAIL")
    if skips == len(plain.results) - 1:
        reason = allowed.reason(program, "all") if plain.end in ("exit 0", "exit 4") else None
        if reason:
            say("      skipped (%s)" % reason)
            tally.skipped += 1
        else:
            tally.add(where + ": skips all of its tests, and tools/series/%s does not say why" % LIST, "FAIL")
    differs, reasons = 0, {}
    for number in sorted(set(plain.results).union(*(r.results for r in moved)), key=lambda n: n.zfill(6)):
        want = plain.of(number)
        others = {got: allowed.reason(program, number, want, got)
                  for got in (r.of(number, want) if r.torn else r.of(number) for r in moved) if got != want}
        got = next((g for g, reason in others.items() if not reason), None)
        if not others:
            tally.passed += want[0] != "SKIP"
        if got is None:
            for reason in others.values():
                reasons.setdefault(reason, []).append(number)
                tally.skipped += 1
            continue
        differs += 1
        tally.failed += 1
        if differs <= 10:
            say("    not ok: %s %s: %s (%s), and while its memory moves %s (%s)" % ((where, number) + want + got))
    if differs > 10:
        say("    not ok: %s: %d more" % (where, differs - 10))
    if any(r.torn for r in moved):
        say("      %d of its runs ended early: a page moved between two looks of vm_util.c at it" %
            sum(r.torn for r in moved))
    for reason, numbers in reasons.items():
        say("      %d of them differ (%s): %s" % (len(numbers), reason, " ".join(numbers[:12])))


@contextlib.contextmanager
def mm_tests(tally, kernels, tier, boot):
    """All in one boot, by boot(program, arguments, log, output), beside what the caller does meanwhile."""
    log = "%s-mm-tests" % tier
    output = logfile(log + "-output")
    directories = None
    with tally.test("%s: mainline's mm tests build" % tier):
        turns = kernels.static("turns")
        allowed = Allowed(tier)
        directories = build(kernels)
    if not directories:
        yield
        return
    args = []
    for program, (name, *more) in COMMANDS.items():
        for variant, directory in zip(("plain", "moved"), directories):
            args += ["--", str(LIMIT), str(REPEAT if variant == "moved" else 0), str(TIMES),
                     "%s/%s" % (program, variant), "/host%s/%s" % (directory, name)] + more

    def run():
        with open(output, "wb") as f:
            return boot(turns, args[1:], log, f)

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        began, status = time.monotonic(), thread.submit(run)
        yield
        with tally.test("%s: mainline's mm tests, as they are and while their memory moves" % tier, began):
            if status.result():
                raise Failure("it ended with status %d" % status.result(), output)
    runs = parse(read(output))
    for program in COMMANDS:
        compare(tally, tier, program, runs.get(program, {}), allowed)
    for program, number, _, reason in allowed.unused():
        tally.add("%s:mm:%s %s: %s does not hold: %s;" % (tier, program, number, LIST, reason), "FAIL")
