# SPDX-License-Identifier: GPL-2.0
"""Progress, logs, processes and git: what the rest of the harness stands on."""

import concurrent.futures
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
HERE = os.path.join(TOP, "tools", "series")
CACHE = os.path.abspath(os.environ.get("RUST_HMM_CACHE") or os.path.join(
    os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "rust-hmm"))
LOGS = os.path.join(CACHE, "log")
JOBS = os.environ.get("JOBS") or str(os.cpu_count() or 1)
KILLED = 124        # the status of what ran out of time, as timeout(1) has it


def clean_env():
    """The environment for everything started here.

    Without what make passes down, without what would redirect a kernel build, and with no
    personal git configuration: the same input gives the same commits and patches everywhere.
    """
    drop = re.compile(r"(MAKE.*|MFLAGS|GNUMAKEFLAGS|JOBS|TREE|FILE|RUN|ARGS|DRIVER|KVM|DEBUG|SAMPLE|MM|UPDATE|KERNEL_TREE|O|V|W|C|M|"
                      r"ARCH|SUBARCH|CROSS_COMPILE|CC|LD|HOSTCC|LLVM|CLIPPY|K[A-Z]*FLAGS|KBUILD_.*|"
                      r"KCONFIG_.*|INSTALL_.*|GIT_.*|QUILT_.*|LC_.*|LANG|LANGUAGE)")
    env = {k: v for k, v in os.environ.items() if not drop.fullmatch(k)}
    env.update(LC_ALL="C.UTF-8", GIT_CONFIG_GLOBAL="/dev/null", GIT_CONFIG_NOSYSTEM="1",
               GIT_CONFIG_COUNT="1", GIT_CONFIG_KEY_0="safe.directory", GIT_CONFIG_VALUE_0="*",
               GIT_TERMINAL_PROMPT="0", PYTHONDONTWRITEBYTECODE="1")
    return env


ENV = clean_env()


class Failure(Exception):
    """Something went wrong; str() is for the person at the screen, log is a file to read."""

    def __init__(self, message, log=None, status=1):
        super().__init__(message)
        self.log = log
        self.status = status


def fail_if(problems, log=None):
    """Raises a Failure that has the first of them."""
    if problems:
        more = ["(and %d more)" % (len(problems) - 15)] if len(problems) > 15 else []
        raise Failure("\n      ".join([""] + sorted(problems)[:15] + more), log)


def read(path):
    with open(path, encoding="utf-8", errors="surrogateescape") as f:
        return f.read()


def write(path, text):
    """Write a file whole or not at all."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".new", "w", encoding="utf-8", errors="surrogateescape") as f:
        f.write(text)
    os.replace(path + ".new", path)


class Screen:
    """Where progress goes: standard output, unless that belongs to the program that is run."""
    stream = sys.stdout


def say(text="", end="\n"):
    print(text, end=end, file=Screen.stream, flush=True)


def duration(seconds):
    return "%.1f s" % seconds if seconds < 60 else "%d min %02d s" % divmod(round(seconds), 60)


@contextlib.contextmanager
def step(text, start=None):
    """One line of progress: the text at once, its time when it is done. It may have begun before,
    beside others."""
    say("  %-62s " % text, end="")
    start = start or time.monotonic()
    try:
        yield
    except BaseException:
        say("FAILED %8s" % duration(time.monotonic() - start))
        raise
    say("%15s" % duration(time.monotonic() - start))


class Tally:
    """The tests of one run. Each has a name; a failed one says why at once."""

    def __init__(self):
        self.passed = self.failed = self.skipped = 0
        self.skips = {}
        for line in read(os.path.join(HERE, "skips")).splitlines():
            name, _, reason = line.partition(" ")
            if name and not name.startswith("#"):
                self.skips[name] = reason.strip()

    @contextlib.contextmanager
    def test(self, name, start=None):
        """One test, which is one step: it fails by raising Failure."""
        try:
            with step(name, start):
                yield
            self.passed += 1
        except Failure as e:
            self.failed += 1
            say("    not ok: %s" % e)
            show_log(e)

    def add(self, name, status):
        """One result of many, of a program or a kernel that ran them."""
        if status == "PASS":
            self.passed += 1
        elif status == "SKIP" and name in self.skips:
            self.skipped += 1
            say("    skipped: %s (%s)" % (name, self.skips[name]))
        else:
            self.failed += 1
            say("    not ok: %s%s" % (name, " was skipped, and tools/series/skips does not list it"
                                      if status == "SKIP" else " " + status))

    def results(self, prefix, results, output=None):
        """Those of a program; of what it has printed, the lines that say why one failed."""
        for name, status in results:
            self.add(prefix + name, status)
        if output and any(status not in ("PASS", "SKIP") for _, status in results):
            why = [l for l in read(output).splitlines() if re.match(r"# (\S+\.c:\d+:|\S+: Test )", l)]
            say("".join("      %s\n" % l for l in why[:15]) + "      its output: %s" % output)

    def finish(self):
        """The last line of a run, and its exit status."""
        say("%d passed, %d failed, %d skipped" % (self.passed, self.failed, self.skipped))
        sys.exit(1 if self.failed or not self.passed else 0)


def logfile(name):
    os.makedirs(LOGS, exist_ok=True)
    return os.path.join(LOGS, name + ".log")


def tail(log, lines=20):
    """The lines of a log that most likely tell what went wrong."""
    try:
        text = [l.rstrip() for l in read(log).splitlines() if l.strip()]
    except OSError:
        return []
    commands = [i for i, l in enumerate(text) if l.startswith("$ ")]
    text = text[commands[-1]:] if commands else text
    bad = re.compile(r"\b(error|Error|fatal|undefined|Kernel panic|BUG|WARNING|FAILED|not found|No such file)\b")
    first = next((i for i, l in enumerate(text) if bad.search(l) and "*** " not in l), None)
    if first is None or first > len(text) - lines:
        return text[-lines:]
    return text[max(0, first - 2):first + lines - 2]


def ahead(items, first, then):
    """first(item) of one after the other, and then(item, what that gave) of each in another thread
    while first() of the next runs. Yields (item, when it began, a future)."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        last = None
        for item in items:
            began, future = time.monotonic(), concurrent.futures.Future()
            try:
                future = thread.submit(then, item, first(item))
            except Failure as e:
                future.set_exception(e)
            if last:
                yield last
            last = item, began, future
        if last:
            yield last


RUNNING = set()     # what run() waits for; each is a process group of its own


def kill_group(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def interrupted(_signal, _frame):
    """Nothing goes on running when this program is told to end."""
    for process in list(RUNNING):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    raise KeyboardInterrupt


def handle_signals():
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(s, interrupted)


def run(command, log, cwd=None, env=None, timeout=3600, what=None, check=True, stdin=None):
    """Run a command with its output in a log file. A status other than 0 is a Failure."""
    path = logfile(log)
    with open(path, "a", encoding="utf-8") as f:
        f.write("$ %s\n" % " ".join(command))
        f.flush()
        process = subprocess.Popen(command, cwd=cwd, env=env or ENV, stdout=f, stderr=subprocess.STDOUT,
                                   stdin=stdin or subprocess.DEVNULL, start_new_session=True)
        RUNNING.add(process)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            kill_group(process)
            raise Failure("%s did not end within %s" % (what or command[0], duration(timeout)), path, KILLED)
        except BaseException:
            kill_group(process)
            raise
        finally:
            RUNNING.discard(process)
    if status and check:
        raise Failure("%s failed (status %d)" % (what or " ".join(command[:3]), status), path)
    return status


def output(*command, cwd=None, check=True, env=None, strip=True):
    """The standard output of a short command."""
    p = subprocess.run(command, cwd=cwd, env=env or ENV, stdin=subprocess.DEVNULL, check=False,
                       stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if p.returncode and check:
        raise Failure("%s: %s" % (" ".join(command), p.stderr.decode(errors="replace").strip()))
    text = p.stdout.decode("utf-8", "surrogateescape")
    return text.strip() if strip else text


def git(repo, *args, **kw):
    return output("git", "-C", repo, *args, **kw)


def git_ok(repo, *args):
    return subprocess.run(("git", "-C", repo) + args, env=ENV, stdin=subprocess.DEVNULL, check=False,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def identity(name, email, date):
    """Environment for a commit that is the same wherever it is made."""
    return dict(ENV, GIT_AUTHOR_NAME=name, GIT_AUTHOR_EMAIL=email, GIT_AUTHOR_DATE=date,
                GIT_COMMITTER_NAME=name, GIT_COMMITTER_EMAIL=email, GIT_COMMITTER_DATE=date)


@contextlib.contextmanager
def scratch(name):
    """A directory in the cache for something half done; gone afterwards, whatever happens."""
    os.makedirs(os.path.join(CACHE, "tmp"), exist_ok=True)
    path = tempfile.mkdtemp(prefix=name + ".", dir=os.path.join(CACHE, "tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def show_log(e):
    if isinstance(e, Failure) and e.log:
        for line in tail(e.log):
            say("      " + line)
        say("    the whole log: %s" % e.log)


def die(e):
    say("\n%s: %s" % (os.path.basename(sys.argv[0]), e))
    show_log(e)
    sys.exit(getattr(e, "status", 1))
