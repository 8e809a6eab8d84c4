# SPDX-License-Identifier: GPL-2.0
"""compile-fail/: what a driver must not do does not compile, and for the reason that is given."""

import glob
import os
import re
import shutil

from common import HERE, Failure, logfile, read, scratch, write


def compile_fail(tally, kernels):
    """Each case as a module of its own: rustc says the error that the case names, and no other.

    The one that names none is what a driver does, and has to compile."""
    kernels.demo_kernel()
    cases = sorted(glob.glob(HERE + "/compile-fail/*.rs"))
    with scratch("compile-fail") as tmp:
        names = [os.path.basename(c)[:-3] for c in cases]
        for case in cases:
            shutil.copy(case, tmp)
        write(tmp + "/Makefile", "".join("obj-m += %s.o\nRUSTFLAGS_%s.o := --extern hmm\n" % (n, n) for n in names))
        for name in names:
            wanted = re.search(r"^//! Error: (.*)$", read("%s/%s.rs" % (tmp, name)), re.M)
            with tally.test("compile: " + (name if wanted else name + ", which is right,")):
                log = logfile("compile-" + name)
                if os.path.exists(log):
                    os.unlink(log)
                status = kernels.make("um", "M=" + tmp, name + ".o", log="compile-" + name, check=False)
                said = {code or text for code, text in re.findall(
                    r"^error(?:\[(E\d+)\])?: (.*)$", read(log), re.M) if not text.startswith("aborting")}
                if said != ({wanted.group(1)} if wanted else set()) or bool(status) != bool(wanted):
                    raise Failure("rustc should say %s, and says %s" % (
                        wanted.group(1) if wanted else "nothing", ", ".join(sorted(said)) or "nothing"), log)
