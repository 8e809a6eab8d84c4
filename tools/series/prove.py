# SPDX-License-Identifier: GPL-2.0
"""`make bisect` and `make mutants`: the series step by step, and whether the tests notice."""

import functools
import glob
import os
import re

import patches
from common import HERE, Failure, ahead, git, git_ok, identity, logfile, read, run
from kernel import KUNITCONFIG

MUTANTS = os.path.join(HERE, "mutants")
PLANTED = os.path.join(HERE, "planted.diff")
MUTANT_TIMEOUT = 40
HUGE = "hmm_large."     # the suite that UML does not have
SPAN = 2
# What no kernel is made of, and what none without Rust is.
NO_KERNEL = ("Documentation", "MAINTAINERS", "tools/testing/selftests")
ONLY_RUST = ("rust", "*.rs")


def builds(kernels, without=True):
    """What is checked out in kernels.src builds, with Rust and without."""
    if without:
        kernels.build("norust", HERE + "/norust.config")
    kernels.kunit_build()


def suites_pass(kernels, image=None):
    results, _ = kernels.kunit_run(image=image)
    bad = ["%s %s" % r for r in results if r[1] not in ("PASS", "SKIP")]
    if bad:
        raise Failure("these tests fail: " + ", ".join(bad), logfile("kunit"))
    return results


def bisect_step(kernels):
    """What the commit checked out in kernels.src is worth: 0 good, 1 bad, 125 cannot be built."""
    try:
        builds(kernels)
    except Failure as e:
        return 125, e
    try:
        return 0, suites_pass(kernels)
    except Failure as e:
        return 1, e


def sample(items, head):
    """All; or, with SAMPLE=n, every n-th, from one on that depends on the series."""
    n = max(1, int(os.environ.get("SAMPLE") or 1))
    return items[int(head, 16) % n::n]


def walk(tally, base, head, kernels, worktree):
    """Every commit builds, with Rust and without, and its KUnit suites pass."""
    commits = git(base.repo, "rev-list", "--reverse", "%s..%s" % (base.commit, head)).split()

    def changes(number, but):
        """Whether the commit changes more than what these patterns match."""
        return not number or not git_ok(base.repo, "diff", "--quiet", commits[number - 1], commits[number], "--",
                                        ".", *(":!" + pattern for pattern in but))

    def build(commit):
        """The kernel to boot, or None where the commit changes nothing that one is made of."""
        number = commits.index(commit)
        if not changes(number, NO_KERNEL):
            return None
        worktree(base, "src", commit)
        builds(kernels, changes(number, NO_KERNEL + ONLY_RUST))
        return kernels.kunit_image()

    chosen = sample(commits, head)
    for commit, began, booted in ahead(chosen, build, lambda _, image: image and suites_pass(kernels, image)):
        subject = git(base.repo, "log", "-1", "--format=%s", commit)
        name = "bisect: %d/%d %s" % (commits.index(commit) + 1, len(commits), subject)
        with tally.test(name[:62], began):
            booted.result()


def groups(tally, base, head, kernels, worktree):
    """Every group builds on what it needs and no more, and its KUnit suites pass. Where that is all
    that comes before it, it does if its last patch does."""
    apart = [name for name, _ in patches.grouped() if not patches.is_start(patches.alone(name))]
    for name in sample(apart, head):
        with tally.test("bisect: the group %s on what it needs" % name):
            tree = worktree(base, "apply", "base")
            patches.git_am(tree, patches.alone(name))
            worktree(base, "src", git(tree, "rev-parse", "HEAD"))
            builds(kernels)
            suites_pass(kernels)


def diff_of(path):
    """(prose, tests that it names) of a file that is prose and then a diff."""
    text = read(path)
    prose = text.split("\ndiff --git ")[0]
    return prose, re.findall(r"^Test:\s*(\S+)\s*$", prose, re.M)


def apply(src, path):
    """Applies a diff with prose before it to what is checked out."""
    if run(["git", "-C", src, "apply", path], "apply", check=False):
        raise Failure("%s does not apply" % path, logfile("apply"))


def plant(base, head, tree):
    """The series with one more commit: in its middle, or later, where the diff applies and the
    series' own suites run already. A line "After: subject" asks for a later place, e.g. where the
    test comes that finds the bug. Returns (good, the bug, bad): SPAN commits to either side."""
    commits = git(base.repo, "rev-list", "--reverse", "%s..%s" % (base.commit, head)).split()
    author = identity("series", "series@localhost", "2000-01-01T00:00:00Z")
    after = re.search(r"^After: (.*)", diff_of(PLANTED)[0], re.M)
    reached = not after
    for number, commit in enumerate(commits, 1):
        reached = reached or git(tree, "log", "-1", "--format=%s", commit) == after.group(1).strip()
        if not reached or number < len(commits) // 2 or \
           not git_ok(tree, "cat-file", "-e", "%s:%s" % (commit, KUNITCONFIG)):
            continue
        git(tree, "checkout", "-q", "-f", "--detach", commit)
        if not git_ok(tree, "apply", "--index", PLANTED):
            continue
        run(["git", "-C", tree, "commit", "-q", "-m", "plant a bug"], "planted", env=author)
        bug = git(tree, "rev-parse", "HEAD")
        good, rest = commits[max(0, number - 1 - SPAN)], commits[number:number + SPAN]
        if not rest or run(["git", "-C", tree, "cherry-pick"] + rest, "planted", env=author, check=False) == 0:
            return good, bug, git(tree, "rev-parse", "HEAD")
        git(tree, "cherry-pick", "--abort", check=False)
    raise Failure("tools/series/planted.diff applies nowhere in the series", logfile("planted"))


def planted(base, head, kernels, worktree):
    """git bisect run, with the script that developers use, finds a commit that breaks a test."""
    good, bug, bad = plant(base, head, worktree(base, "apply", head))
    src = worktree(base, "src", bad)
    git(src, "bisect", "reset", check=False)
    git(src, "bisect", "start", bad, good)
    try:
        log = logfile("bisect-run")
        run(["git", "-C", src, "bisect", "run", os.path.join(HERE, "bisect-step"), "--in-cache"], "bisect-run",
            env=dict(os.environ, **kernels.tc.env), what="git bisect run", timeout=3600, cwd=src)
        found = re.search(r"^(\w{40}) is the first '?bad'? commit", read(log), re.M)
        if not found or found.group(1) != bug:
            raise Failure("git bisect run found %s, and not the planted commit %s"
                          % (found.group(1) if found else "nothing", bug), log)
    finally:
        git(src, "bisect", "reset", check=False)


def was_running(log, suite):
    """Whether a boot with only one test of that suite went down while the test ran."""
    lines = [re.sub(r"^\[[^]]*\] ", "", l) for l in log.splitlines()]
    start = next((i for i, l in enumerate(lines) if re.match(r"\s+# Subtest: %s$" % re.escape(suite), l)), None)
    if start is None:
        return False
    return not any(re.match(r"\s*(not )?ok \d+ ", l) for l in lines[start:])


def verdict(test, run):
    """PASS, SKIP, FAIL (also: the kernel went down, or hung, in that test) or what else happened.

    run(test) boots a kernel with that test alone, and returns the results and the log."""
    suite = test.split(".")[0]
    try:
        results, log = run(test)
    except Failure:
        results, log = [], ""
    own = [s for name, s in results if name == test or name.startswith(test + ".")]
    if own:
        return next((s for s in own if s not in ("PASS", "SKIP")), own[0]).replace("ERROR", "FAIL")
    if was_running(log, suite):
        return "FAIL"
    return "is not run"


def mutant_files(huge):
    """Those whose tests need huge pages, or the others."""
    return [f for f in sorted(glob.glob(MUTANTS + "/*.diff")) if huge == any(t.startswith(HUGE) for t in diff_of(f)[1])]


def named_by(files):
    return sorted({t for f in files for t in diff_of(f)[1]})


def all_pass(named, results, log):
    """Those of the tests that are named, all of which pass."""
    unbroken = [t for t in named if results.get(t) == "PASS" or
                any(n.startswith(t + ".") and s == "PASS" for n, s in results.items())]
    missing = sorted(set(named) - set(unbroken))
    if missing:
        raise Failure("these do not pass: " + " ".join(missing), log)
    return unbroken


def notices(path, run, log):
    """Each test that the mutant names fails with it."""
    for test in diff_of(path)[1]:
        got = verdict(test, run)
        if got != "FAIL":
            raise Failure("%s: %s, it should fail" % (test, got), log)


def mutants(tally, base, head, kernels, worktree):
    files = mutant_files(huge=False)
    named, unbroken = named_by(files), []
    with tally.test("mutants: without one, all %d tests that they name pass" % len(named)):
        if not files:
            raise Failure("there are no mutants in " + MUTANTS)
        worktree(base, "src", head)
        kernels.kunit_build()
        unbroken = all_pass(named, dict(kernels.kunit_run()[0]), logfile("kunit"))

    def build(path):
        if not diff_of(path)[1]:
            raise Failure("%s names no test (Test: suite.test)" % path)
        src = worktree(base, "src", head)
        apply(src, path)
        kernels.kunit_build()
        return kernels.kunit_image()

    def boot(path, image):
        for test in diff_of(path)[1]:
            if test not in unbroken:
                raise Failure("%s does not pass without the mutant" % test)
        notices(path, functools.partial(kernels.kunit_run, timeout=MUTANT_TIMEOUT, image=image), logfile("kunit"))

    chosen = sample(files, head)
    for path, began, booted in ahead(chosen, build, boot):
        with tally.test("mutant: " + os.path.basename(path)[:-5], began):
            booted.result()
    worktree(base, "src", head)
