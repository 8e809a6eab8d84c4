# SPDX-License-Identifier: GPL-2.0
"""Mainline's tests of HMM, tools/testing/selftests/mm/hmm-tests.c, unmodified but for those that the series adds."""

import fnmatch
import os
import re

from common import HERE, Failure, git, read, run, say

MM = "tools/testing/selftests/mm"
HMM_TESTS = "hmm-tests"


def build(kernels):
    """hmm-tests as its Makefile makes it, but for the linking. Returns its path."""
    path = os.path.join(kernels.dir(HMM_TESTS), HMM_TESTS)
    run(["make", "-C", os.path.join(kernels.src, MM), "OUTPUT=" + os.path.dirname(path), "LDFLAGS=-static",
         "KHDR_INCLUDES=-isystem %s/usr/include" % kernels.dir("headers")] + kernels.tc.make + [path],
        "build-hmm-tests", env=kernels.tc.env, what="the build of hmm-tests")
    return path


def names(src, commit=None):
    """Every fixture.variant.test there is, in the order in which they run; or that there is in a commit."""
    path = os.path.join(MM, HMM_TESTS + ".c")
    text = git(src, "show", "%s:%s" % (commit, path)) if commit else read(os.path.join(src, path))
    variants = re.findall(r"^FIXTURE_VARIANT_ADD\((\w+), (\w+)\)", text, re.M)
    tests = re.findall(r"^TEST_F(?:_\w+)?\((\w+), (\w+)", text, re.M)
    return ["%s.%s.%s" % (f, v, t) for f, v in variants for fixture, t in tests if fixture == f]


def added(src):
    """Those that the series adds for what it fixes in mm, of the variant that needs no memory set aside."""
    before = names(src, "base")
    return [t for t in names(src) if t not in before and "_private." in t]


def listed(path, tests):
    """Those of the tests that a list says are not to be run, with the reason."""
    reasons = {}
    for line in read("%s/%s" % (HERE, path)).splitlines():
        pattern, _, reason = line.partition(" ")
        if not pattern or pattern.startswith("#"):
            continue
        found = fnmatch.filter(tests, pattern)
        if not found:
            raise Failure("%s: there is no test %s" % (path, pattern))
        reasons.update((t, reason.strip()) for t in found)
    return reasons


def arguments(tests, later):
    """Has hmm-tests run those tests that are not for later."""
    return [arg for t in tests if t not in later for arg in ("-r", t)]


def tell(tally, later):
    """Says which are for later."""
    for reason in dict.fromkeys(later.values()):
        say("    skipped: %d of its tests (%s)" % (sum(r == reason for r in later.values()), reason))
    tally.skipped += len(later)
