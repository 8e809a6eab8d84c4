# SPDX-License-Identifier: GPL-2.0
"""The series as files: patches/, `series`, MAINTAINERS.fragment and the exported files."""

import email
import email.header
import email.utils
import glob
import hashlib
import os
import re
import stat

from common import ENV, Failure, TOP, git, git_ok, output, read, run, scratch

PATCHES = os.path.join(TOP, "patches")
SERIES = os.path.join(TOP, "series")
GROUPS = os.path.join(TOP, "groups")
EXPORTED = ("mm", "include", "drivers", "rust", "arch", "Documentation", "tools/testing")
MAX_MAIL = 100000
FORMAT = ("-N", "--no-renames", "--no-signature", "--zero-commit", "--full-index", "--no-thread",
          "--diff-algorithm=myers", "--unified=3", "--no-attach", "--src-prefix=a/", "--dst-prefix=b/")


def patch_files():
    """The patches in the order of the file `series`."""
    if not os.path.exists(SERIES):
        raise Failure("there is no file `series`: the repository has no patches yet")
    return [path for _, paths in grouped() for path in paths]


def groups():
    """[(name, names of the groups that it needs, subject of its first patch)], as the file `groups` has them."""
    found = []
    for line in read(GROUPS).splitlines():
        if line.strip() and not line.startswith("#"):
            name, needs, first = (part.strip() for part in line.split("|"))
            found.append((name, needs.split(), first))
    return found


def grouped():
    """[(name, patches)] of the file `series`: a line of comment begins a group."""
    found = []
    for line in read(SERIES).splitlines():
        if line.startswith("# "):
            found.append((line[2:].split(":")[0], []))
        elif line:
            found[-1][1].append(os.path.join(PATCHES, line))
    return found


def prerequisites(name):
    """All groups that a group stands on, those that its own need included, in the order of the series."""
    needs = {n: direct for n, direct, _ in groups()}
    found, todo = set(), [name]
    while todo:
        for n in needs[todo.pop()]:
            if n not in found:
                found.add(n)
                todo.append(n)
    return [n for n in needs if n in found]


def alone(name):
    """The patches of a group and of those that it needs."""
    wanted = prerequisites(name) + [name]
    return [p for n, paths in grouped() if n in wanted for p in paths]


def is_start(files):
    """Whether the series begins with these patches, so that whoever applies all has applied them."""
    return files == patch_files()[:len(files)]


def cover(name):
    """The path of a group's cover letter."""
    return os.path.join(PATCHES, "0000-%s.txt" % name)


def series_file(names, subjects):
    """The file `series`: the patches in their groups."""
    starts = {first: (name, needs) for name, needs, first in groups()}
    missing = [first for first in starts if first not in subjects]
    if missing or subjects[0] not in starts:
        raise Failure("the file `groups` names no patch of the series: " + (missing or [subjects[0]])[0])
    text = ""
    for name, subject in zip(names, subjects):
        if subject in starts:
            group, needs = starts[subject]
            text += "%s# %s: %s\n" % ("\n" if text else "", group,
                                     "needs " + " ".join(needs) if needs else "applies to the base alone")
        text += name + "\n"
    return text.encode()


def key(base):
    """What the series on this base is, in one word: changes with any byte of it."""
    h = hashlib.sha256(base.encode())
    for path in patch_files():
        h.update(os.path.basename(path).encode() + b"\0" + open(path, "rb").read() + b"\0")
    return h.hexdigest()[:16]


def author(patch):
    """(name, address, date) of a mail, for a committer who is the author: commits reproduce."""
    with open(patch, "rb") as f:
        mail = email.message_from_binary_file(f)
    name, address = email.utils.parseaddr(str(email.header.make_header(
        email.header.decode_header(mail["From"] or ""))))
    return name or "unknown", address or "unknown", mail["Date"] or ""


def am_env(patches):
    name, address, date = author(patches[0])
    return dict(ENV, GIT_COMMITTER_NAME=name, GIT_COMMITTER_EMAIL=address, GIT_COMMITTER_DATE=date)


def git_am(worktree, patches):
    """Apply the mails as anyone would, to what is checked out there."""
    run(["git", "-C", worktree, "am", "-q", "--committer-date-is-author-date"] + patches, "git-am",
        env=am_env(patches), what="git am of the series")


def base_of(tree):
    """The commit that the series in a developer's tree starts from."""
    for name in ("base", "v" + read(os.path.join(TOP, "BASE")).split("#")[0].split()[0]):
        if git_ok(tree, "rev-parse", "-q", "--verify", name + "^{commit}"):
            commit = git(tree, "rev-parse", name + "^{commit}")
            if git_ok(tree, "merge-base", "--is-ancestor", commit, "HEAD"):
                return commit
    raise Failure("%s has no branch `base` below HEAD to count the series from\n"
                  "  git -C %s branch base COMMIT" % (tree, tree))


def generate(repo, base, head):
    """The patches and everything made from them: {path in the repository: (mode, bytes)}."""
    if git(repo, "rev-list", "--merges", "%s..%s" % (base, head)):
        raise Failure("there are merges between base and %s: a series is a line of commits" % head)
    files = {}
    with scratch("format-patch") as tmp:
        git(repo, "format-patch", *FORMAT, "-o", tmp, "%s..%s" % (base, head))
        names = sorted(os.listdir(tmp))
        for name in names:
            with open(os.path.join(tmp, name), "rb") as f:
                files["patches/" + name] = (0o644, f.read())
    if not names:
        raise Failure("no commits between base and %s in %s" % (head, repo))
    subjects = git(repo, "log", "--reverse", "--format=%s", "%s..%s" % (base, head)).splitlines()
    files["series"] = (0o644, series_file(names, subjects))
    files.update(exports(repo, base, head))
    return files


def exports(repo, base, head):
    """What the series adds, at kernel paths, and the lines that it adds to MAINTAINERS."""
    files = {}
    added = git(repo, "diff", "--no-renames", "--diff-filter=A", "--raw", "-z", "--abbrev=40", base, head,
                "--", *EXPORTED)
    fields = added.split("\0")
    for info, path in zip(fields[::2], fields[1::2]):
        _, mode, _, blob, _ = info.split()
        if mode not in ("100644", "100755"):
            raise Failure("%s: mode %s, only plain files are exported" % (path, mode))
        data = output("git", "-C", repo, "cat-file", "blob", blob, strip=False)
        files[path] = (int(mode, 8) & 0o777, data.encode("utf-8", "surrogateescape"))
    diff = git(repo, "diff", "--no-renames", "--no-color", "--unified=0", base, head, "--", "MAINTAINERS", strip=False)
    lines = re.findall(r"^\+(?!\+\+ )(.*\n)", diff, re.M)
    files["MAINTAINERS.fragment"] = (0o644, "".join(lines).encode())
    return files


def on_disk(patches):
    """The files of the repository that are made from the series, as generate() has them."""
    paths = [os.path.join(TOP, "MAINTAINERS.fragment")]
    if patches:
        paths += [SERIES] + glob.glob(os.path.join(PATCHES, "*.patch"))
    for top in EXPORTED:
        for directory, dirs, names in os.walk(os.path.join(TOP, top)):
            dirs[:] = [d for d in dirs if d != "__pycache__"]
            paths += [os.path.join(directory, n) for n in names]
    files = {}
    for path in paths:
        if os.path.exists(path):
            with open(path, "rb") as f:
                mode = 0o755 if os.stat(path).st_mode & stat.S_IXUSR else 0o644
                files[os.path.relpath(path, TOP)] = (mode, f.read())
    return files


def differences(want, have):
    """One line for each file that is missing, stale or different."""
    return (["%s: not in the repository" % p for p in sorted(want.keys() - have.keys())] +
            ["%s: not made by the series" % p for p in sorted(have.keys() - want.keys())] +
            ["%s: differs" % p for p in sorted(want.keys() & have.keys()) if want[p] != have[p]])


def install(want):
    """Make the repository's files those; what has not changed is not touched."""
    have = on_disk(patches=True)
    for path in have.keys() - want.keys():
        os.unlink(os.path.join(TOP, path))
        directory = os.path.dirname(os.path.join(TOP, path))
        while directory != TOP and not os.listdir(directory):
            os.rmdir(directory)
            directory = os.path.dirname(directory)
    for path, (mode, data) in want.items():
        full = os.path.join(TOP, path)
        if have.get(path) == (mode, data):
            continue
        os.makedirs(os.path.dirname(full), exist_ok=True)
        with open(full + ".new", "wb") as f:
            f.write(data)
        os.chmod(full + ".new", mode)
        os.replace(full + ".new", full)
    return differences(want, have)


def mail_problems(name, data):
    """What would make a list or a maintainer refuse this mail."""
    problems = []
    if len(data) > MAX_MAIL:
        problems.append("%s: %d bytes, lists take no more than %d" % (name, len(data), MAX_MAIL))
    for number, line in enumerate(data.split(b"\n"), 1):
        if re.match(rb"(Signed-off-by|Acked-by|Reviewed-by|Tested-by):", line):
            problems.append("%s:%d: a trailer that only its signer may add" % (name, number))
        if any(c > 126 or (c < 32 and c != 9) for c in line) and not line.startswith(b"-"):
            problems.append("%s:%d: a character outside ASCII" % (name, number))
    return problems
