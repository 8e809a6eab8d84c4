# SPDX-License-Identifier: GPL-2.0
"""`make check`: what can be said of the series without running it."""

import concurrent.futures
import fnmatch
import functools
import glob
import os
import queue
import re
import time

import patches
from audit import export_audit
from compilefail import compile_fail
from common import ENV, HERE, JOBS, Failure, fail_if, git, git_ok, logfile, output, read, run, scratch, write
from kernel import SELFTESTS


class Changes:
    """What the series touches: the files that it adds, and the lines that it changes in others."""

    def __init__(self, repo, base, head):
        self.added, self.lines = set(), {}
        for line in git(repo, "diff", "--no-renames", "--name-status", base, head).splitlines():
            status, path = line.split("\t", 1)
            if status == "A":
                self.added.add(path)
            elif status == "M":
                self.lines[path] = set()
        path = None
        for line in git(repo, "diff", "--no-renames", "--no-color", "--unified=0", base, head).splitlines():
            if line.startswith("+++ "):
                path = line[6:]
            m = re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line)
            if m and path in self.lines:
                start, count = int(m.group(1)), int(m.group(2) or 1)
                self.lines[path].update(range(start, start + count))

    def files(self, *endings):
        return sorted(f for f in self.added | set(self.lines) if f.endswith(endings))

    def ours(self, path, line):
        return path in self.added or line in self.lines.get(path, ())


TESTS = re.compile(r"kunit|^tools/testing/|^lib/test_|^Documentation/|_test\.")


def code_lines(repo, commit):
    """How many lines of code a commit adds: not blank, no comment, and not of tests."""
    count, path, in_tests = 0, "", False
    for line in git(repo, "show", "--format=", "--no-renames", "--no-color", "--unified=100000", commit).splitlines():
        if line.startswith("+++ "):
            path, in_tests = line[6:], False
        elif line[:1] in "+ " and path:
            in_tests = in_tests or line[1:].startswith("#[kunit_tests(")
            text = line[1:].strip()
            if line[0] == "+" and text and not in_tests and not TESTS.search(path) and \
               not text.startswith(("//", "/*", "*", "# ", "#!")):
                count += 1
    return count


def rewritten(repo, commits):
    """{commit: how many lines it takes away that an earlier one of them has added}."""
    counts = dict.fromkeys(commits, 0)
    for commit in commits:
        # What is not there any more is what the way back would add.
        gone = Changes(repo, commit, commit + "^")
        for path in (gone.added | set(gone.lines)) - {"MAINTAINERS"}:
            places = ["-L%d,%d" % (n, n) for n in sorted(gone.lines.get(path, ()))]
            if places or path in gone.added:
                blamed = git(repo, "blame", "-l", "-s", *places, commit + "^", "--", path).splitlines()
                counts[commit] += sum(l.split()[0] in counts for l in blamed)
    return counts


def findings(text, src, changes, directory=""):
    """The compiler's, clippy's and kernel-doc's warnings in lines of ours.

    They name files from the root of the tree, or from the directory that is given."""
    found, rust = [], ""
    gcc = re.compile(r"^(\S+?):(\d+)(?::\d+)?: (?:fatal )?((?:warning|error): .*)", re.I)
    kernel_doc = re.compile(r"^(?:Warning|Error): (\S+?):(\d+):? (.*)")
    for line in text.splitlines():
        if re.match(r"(warning|error)(\[\w+\])?: ", line):
            rust = line
        place = re.match(r"\s*--> (\S+?):(\d+):\d+", line)
        m = place or gcc.match(line) or kernel_doc.match(line)
        if not m:
            continue
        path = os.path.relpath(os.path.join(src, directory, m.group(1)), src)
        if changes.ours(path, int(m.group(2))):
            found.append("%s:%s: %s" % (path, m.group(2), rust if place else m.group(3)))
    return list(dict.fromkeys(found))


def quilt(tree, files):
    env = dict(ENV, QUILT_PATCHES=patches.PATCHES, QUILT_SERIES=patches.SERIES, QUILT_PC=".pc",
               QUILTRC="/dev/null")
    run(["quilt", "--quiltrc", "-", "push", "-a", "--fuzz=0"], "quilt", cwd=tree, env=env,
        what="quilt push -a")
    applied = output("quilt", "--quiltrc", "-", "applied", cwd=tree, env=env).split()
    if [os.path.basename(p) for p in applied] != [os.path.basename(p) for p in files]:
        raise Failure("quilt applied something else than the series", logfile("quilt"))
    git(tree, "add", "-A", "-f", "--", ".", ":!.pc")
    return git(tree, "write-tree")


def quiltimport(tree, files):
    run(["git", "-C", tree, "quiltimport", "--patches", patches.PATCHES, "--series", patches.SERIES],
        "quiltimport", env=patches.am_env(files), what="git quiltimport")
    return git(tree, "rev-parse", "HEAD^{tree}")


def ignored_types(patch):
    lines = read(os.path.join(HERE, "checkpatch-ignore")).splitlines()
    rules = [l.split()[:2] for l in lines if l.strip() and not l.startswith("#")]
    return [t for t, which in rules if fnmatch.fnmatch(os.path.basename(patch), which)]


# The system's python3 first: it is the one that has the modules of spdxcheck and codespell.
PYTHON = dict(ENV, PATH="/usr/bin:" + ENV["PATH"])


@functools.cache
def dictionary():
    """codespell's, where checkpatch has it from: lines that begin with a typo and "->"."""
    path = output("python3", "-c", "import codespell_lib; print(codespell_lib.__path__[0])", env=PYTHON)
    return [(l.partition("->")[0].strip().lower(), l) for l in read(path + "/data/dictionary.txt").splitlines(True)]


def checkpatch(tree, patch):
    name = "checkpatch-" + os.path.basename(patch)[:4]
    # With the typos that the patch has no word of, checkpatch takes five times as long.
    words = set(re.findall(r"[\w\-'`]+", read(patch).lower()))
    with scratch(name) as tmp:
        typos = os.path.join(tmp, "dictionary")
        write(typos, "".join(l for typo, l in dictionary() if typo in words or re.search(r"[^\w\-'`]", typo)))
        status = run(["perl", "scripts/checkpatch.pl", "--strict", "--codespell", "--codespellfile=" + typos,
                      "--no-signoff", "--show-types", "--no-summary"] +
                     ["--ignore=" + t for t in ignored_types(patch)] + [patch],
                     name, cwd=tree, env=PYTHON, check=False, timeout=300)
    text = read(logfile(name))
    if "typos will be found" in text:
        raise Failure("checkpatch found no dictionary", logfile(name))
    if status or re.search(r"^(ERROR|WARNING|CHECK):", text, re.M):
        raise Failure("checkpatch is not content", logfile(name))


def rustfmt(src, changes):
    files = changes.files(".rs")
    if files:
        run(["rustfmt", "--check", "--color", "never", "--edition", "2021",
             "--config-path", os.path.join(src, ".rustfmt.toml")] + files, "rustfmt", cwd=src, what="rustfmt --check")


def spdx(src, changes):
    files = sorted(f for f in changes.added if os.path.exists(os.path.join(src, f)))
    run(["/usr/bin/python3", "scripts/spdxcheck.py"] + files, "spdxcheck", cwd=src, what="spdxcheck.py")
    missing = [f for f in files if "SPDX-License-Identifier:" not in read(os.path.join(src, f))[:400]
               and os.path.basename(f) not in (".gitignore", ".kunitconfig", "config", "settings")]
    fail_if(["%s: no SPDX-License-Identifier" % f for f in missing])


def quotes(src, rst, body):
    """A file that is quoted is there, and has the lines where a quotation starts and ends, in this order."""
    problems = []
    for used, options in re.findall(r"^\.\. literalinclude:: (\S+)\n((?: +:.*\n)*)", body, re.M):
        path = os.path.join(src, os.path.dirname(rst), used)
        text, at = read(path) if os.path.exists(path) else "", 0
        for option, line in re.findall(r":((?:start|end)-\w+): (.*)", options):
            at = text.find(line, at)
            if at < 0:
                problems.append("%s: :%s: %s is not in %s" % (rst, option, line, used))
                break
            at += len(line)
    return problems


def kernel_doc(src, changes):
    log = logfile("kernel-doc")
    for f in changes.files(".c", ".h"):
        run(["scripts/kernel-doc", "-none", "-Wall", f], "kernel-doc", cwd=src, check=False,
            env=dict(ENV, PYTHONDONTWRITEBYTECODE="1"), timeout=300)
    text = read(log) if os.path.exists(log) else ""
    problems = findings(text, src, changes)
    if "Traceback" in text:
        problems.append("scripts/kernel-doc itself failed")
    for rst in changes.files(".rst"):
        body = read(os.path.join(src, rst))
        for used in re.findall(r"^\.\. kernel-doc:: (\S+)", body, re.M):
            if not os.path.exists(os.path.join(src, used)):
                problems.append("%s: kernel-doc of %s, which is not there" % (rst, used))
        problems += quotes(src, rst, body)
        index = os.path.join(src, os.path.dirname(rst), "index.rst")
        name = os.path.basename(rst)[:-4]
        if rst in changes.added and name != "index" and not (
                os.path.exists(index) and re.search(r"^\s+(\S*/)?%s$" % re.escape(name), read(index), re.M)):
            problems.append("%s: no index.rst leads to it" % rst)
        for used in re.findall(r"\bDocumentation/[\w/.-]+\.rst", body):
            if not os.path.exists(os.path.join(src, used)):
                problems.append("%s: names %s, which is not there" % (rst, used))
    fail_if(problems, log if problems else None)


def maintainers(src, changes):
    """A section has a file, a directory with all below it, or a pattern."""
    lines = re.findall(r"^F:\s*(\S+)", read(os.path.join(src, "MAINTAINERS")), re.M)
    lines = [l for l in lines if l != "*" and l != "*/"]
    fail_if(["%s: not in MAINTAINERS" % f for f in sorted(changes.added)
             if not any(f.startswith(l) if l.endswith("/") else fnmatch.fnmatch(f, l) for l in lines)])


# What a maintainer can be asked to read: lines of code in a patch, without comments and tests; patches of the
# core; lines of earlier patches that later ones write anew, in all.
MAX_LINES, MAX_CORE, MAX_REWRITTEN = 600, 15, 530
CORE = "core", "device-memory"

# What wants huge pages, and so no kernel of UML has; `make x86` builds it.
X86_ONLY = "lib/test_hmm.c", "mm/huge_memory.c", "mm/hmm/kunit/large.rs"


class Lint:
    """A build with clippy and W=1, of what the series touches only, and one of what is Rust in it
    without device memory."""

    def __init__(self, kernels, changes):
        self.k, self.changes = kernels, changes
        self.log = logfile("build-lint")

    def build(self):
        """Everything of ours is compiled anew, or its warnings would not be seen again."""
        k, out = self.k, self.k.dir("lint")
        fragments = [k.kunitconfig()] + [HERE + "/%s.config" % name for name in ("um", "um-smp", "lint")]
        k.configure("lint", *fragments)
        c_files = [f for f in self.changes.files(".c")
                   if not f.startswith(("rust/", "tools/", "scripts/")) and f not in X86_ONLY]
        rust = [f for f in self.changes.files(".rs") if not f.startswith(("tools/", "scripts/"))]
        targets = {f[:-2] + ".o" for f in c_files}
        stale = [f[:-2] + ".o" for f in c_files] + glob.glob("rust/helpers/helpers.o", root_dir=out)
        for f in rust:
            if f.startswith("mm/hmm/"):
                stale.append("rust/hmm.o")
            elif f.startswith("rust/kernel/"):
                stale += ["rust/kernel.o"]
            elif not f.startswith("rust/"):
                targets.add(os.path.dirname(f) + "/")
                stale += glob.glob(os.path.dirname(f) + "/*.o", root_dir=out)
        for f in stale:
            if os.path.exists(os.path.join(out, f)):
                os.unlink(os.path.join(out, f))
        start = time.time() - 1
        if os.path.exists(self.log):
            os.unlink(self.log)
        seen = self.make(out, start, sorted(targets))
        k.configure("lint", *fragments, HERE + "/nodevice.config")
        seen += self.make(out, start, sorted(t for t in targets if t.endswith("/")))
        # A file that was not compiled was not checked.
        fail_if(["%s: not compiled with these configurations, so not checked" % f
                 for f in self.changes.files(".c", ".rs") if f not in X86_ONLY
                 and not f.startswith(("tools/", "scripts/", "rust/bindings/")) and "/" + f not in seen])

    def make(self, out, start, targets):
        """Builds the crates and `targets`; what was compiled, with what it is made of."""
        seen = ""
        self.k.make("lint", "CLIPPY=1", "W=1", "prepare", what="the build with clippy and W=1")
        if targets:
            self.k.make("lint", "CLIPPY=1", "W=1", *targets, what="the build with clippy and W=1")
        for directory, dirs, names in os.walk(out):
            for name in names:
                path = os.path.join(directory, name)
                if name.endswith(".cmd") and os.path.getmtime(path) >= start:
                    seen += read(path)
        return seen

    def warnings(self, rust):
        found = findings(read(self.log), self.k.src, self.changes)
        fail_if([f for f in found if f.split(":")[0].endswith(".rs") == rust])


def selftest_warnings(kernels, changes):
    """The programs, compiled anew with the warnings that a reviewer would turn on."""
    out = kernels.dir("selftests")
    for f in glob.glob(out + "/*"):
        if os.path.isfile(f):
            os.unlink(f)
    log = logfile("build-selftests")
    if os.path.exists(log):
        os.unlink(log)
    kernels.programs("USERCFLAGS=-Wall -Wextra")
    fail_if(findings(read(log), kernels.src, changes, SELFTESTS), log)


def all_checks(tally, base, head, kernels, worktree):
    """Every check, as one test each."""
    repo, files = base.repo, patches.patch_files()
    src = kernels.src
    with tally.test("series: names patches/*.patch in their order"):
        have = sorted(glob.glob(patches.PATCHES + "/*.patch"))
        fail_if([] if files == have else sorted(
            os.path.basename(p) for p in set(files) ^ set(have)) or ["the order differs"])
    with tally.test("series: git am"):
        tree = worktree(base, "apply", "base")
        patches.git_am(tree, files)
        if git(tree, "rev-parse", "HEAD^{tree}") != git(repo, "rev-parse", head + "^{tree}"):
            raise Failure("git am gives another tree than the last time")
    for name, how in (("quilt push -a", quilt), ("git quiltimport", quiltimport)):
        with tally.test("series: %s gives the same tree" % name):
            tree = worktree(base, "apply", "base")
            made = how(tree, files)
            if made != git(repo, "rev-parse", head + "^{tree}"):
                raise Failure("another tree than git am's:\n      " + git(
                    repo, "diff", "--stat", head, made).replace("\n", "\n      "))
    for name, _ in patches.grouped():
        needs = patches.prerequisites(name)
        with tally.test(("series: %s on %s" % (name, ", ".join(needs) or "the base"))[:62]):
            if not patches.is_start(patches.alone(name)):     # `series: git am` has done those
                patches.git_am(worktree(base, "apply", "base"), patches.alone(name))
    with tally.test("export: files and MAINTAINERS.fragment are the patches'"):
        want = patches.exports(repo, base.commit, head)
        have = patches.on_disk(patches=False)
        fail_if(patches.differences(want, have) + (
            [] if not patches.differences(want, have) else ["`make tree && make refresh` makes them anew"]))
    changes = Changes(repo, base.commit, head)
    with tally.test("maintainers: every file that is added has an F: line"):
        maintainers(src, changes)
    with tally.test("mails: size, trailers, ASCII, white space, the number on the cover"):
        problems = []
        for path in files + glob.glob(patches.PATCHES + "/*.txt"):
            with open(path, "rb") as f:
                problems += patches.mail_problems(os.path.basename(path), f.read())
        for name, paths in patches.grouped():
            letter = patches.cover(name)
            text = read(letter) if os.path.exists(letter) else ""
            if not text.startswith("Subject: [PATCH 00/%02d] " % len(paths)):
                problems.append("%s is not the cover letter of %d patches" % (os.path.basename(letter), len(paths)))
        if len(glob.glob(patches.PATCHES + "/*.txt")) != len(patches.grouped()):
            problems.append("there are other cover letters than those of the groups")
        if not git_ok(repo, "diff", "--check", base.commit, head):
            problems += git(repo, "diff", "--check", base.commit, head, check=False).splitlines()
        fail_if(problems)
    commits = git(repo, "rev-list", "--reverse", "%s..%s" % (base.commit, head)).split()
    with tally.test("patches: %d lines of code at most, the core in %d" % (MAX_LINES, MAX_CORE)):
        sizes = {os.path.basename(p): code_lines(repo, c) for c, p in zip(commits, files)}
        core = sum(len(paths) for name, paths in patches.grouped() if name in CORE)
        fail_if(["%s: %d lines of code" % s for s in sizes.items() if s[1] > MAX_LINES]
                + ["%d patches in %s" % (core, " and ".join(CORE))] * (core > MAX_CORE))
    with tally.test("patches: %d lines of others rewritten at most" % MAX_REWRITTEN):
        counts = rewritten(repo, commits)
        fail_if(["%d lines: %s" % (n, git(repo, "log", "-1", "--format=%s", c)) for c, n in counts.items() if n]
                if sum(counts.values()) > MAX_REWRITTEN else [])
    # Each patch in the tree as it is with that patch, as many at a time as there are CPUs.
    trees = queue.SimpleQueue()
    for number in range(int(JOBS)):
        name = "checkpatch-%d" % number
        worktree(base, name, head)
        trees.put(name)

    def checked(commit, path):
        name = trees.get()
        try:
            checkpatch(worktree(base, name, commit), path)
        finally:
            trees.put(name)

    with concurrent.futures.ThreadPoolExecutor(int(JOBS)) as threads:
        done = [threads.submit(checked, c, p) for c, p in zip(commits, files)]
        for path, future in zip(files, done):
            with tally.test("checkpatch: " + os.path.basename(path)[:45]):
                future.result()
    with tally.test("rustfmt"):
        rustfmt(src, changes)
    with tally.test("SPDX"):
        spdx(src, changes)
    with tally.test("kernel-doc and what Documentation refers to"):
        kernel_doc(src, changes)
    lint, built = Lint(kernels, changes), False
    with tally.test("lint: all of ours compiles with clippy and W=1"):
        lint.build()
        built = True
    for name, rust in (("clippy", True), ("W=1", False)):
        with tally.test("lint: no warning of %s in lines of ours" % name):
            if not built:
                raise Failure("there was no complete build")
            lint.warnings(rust)
    if os.path.exists(os.path.join(src, SELFTESTS, "Makefile")):
        with tally.test("lint: no warning in the selftests"):
            selftest_warnings(kernels, changes)
    compile_fail(tally, kernels)
    export_audit(tally, kernels)
