# SPDX-License-Identifier: GPL-2.0
"""The export audit: what crosses the borders of the crate hmm, on either side, and who may link to it.

audit/ has the lists: driver-symbols, what the driver may link to besides the exports; driver-own-pages, what
it needs of mm's all the same; unexported, what the crate reaches and a module does not;
unused-items, what is public and not the driver's; layers, the files from the bottom up; and the modules
that are linked."""

import glob
import json
import os
import re
import shlex

from common import HERE, Failure, fail_if, logfile, output, read, run, say, scratch, write

LISTS = HERE + "/audit/"
EXPORTS = "mm/hmm/exports.c"
# The drivers that use the crate, each in a directory: one with files of its own, and one that is a file.
DUMMY, SAMPLE = "drivers/gpu/dummy", "samples/rust"
DRIVERS = {DUMMY: "dummy_gpu", SAMPLE: "rust_driver_hmm"}
MODULES = ["%s/%s.ko" % d for d in DRIVERS.items()]
RST = "Documentation/mm/hmm-rust.rst"
CONFIG = ("CONFIG_RUST_HMM=y", "CONFIG_RUST_HMM_DEVICE=y", "CONFIG_DEVICE_PRIVATE=y", "CONFIG_DUMMY_GPU=m",
          "CONFIG_SAMPLE_RUST_DRIVER_HMM=m")
TYPES = {"mirror": "Mirror", "mm": "MirroredMm", "pool": "DevicePool", "binding": "DmaBinding",
         "device": "DmaDevice", "ram": "RamPages", "new": "NewMemory",
         "batch": "CopyBatch"}     # of rust_hmm_<this>_<method>


def listed(name, reasons=True):
    """The names in a list, in its order; each line has one, and its reason."""
    lines = [l.split() for l in read(LISTS + name).splitlines() if l.strip() and not l.startswith("#")]
    fail_if(["%s is in audit/%s without a reason" % (l[0], name) for l in lines if reasons and not l[1:]])
    return dict.fromkeys(l[0] for l in lines).keys()


def exports(src):
    """The symbols in exports.c, in its order."""
    return re.findall(r"^EXPORT_SYMBOL\w*\((\w+)", read(os.path.join(src, EXPORTS)), re.M)


def layers(src):
    """The files of the crate use only those below them."""
    order = list(listed("layers", reasons=False))
    files = {os.path.basename(p)[:-3] for p in glob.glob(src + "/mm/hmm/*.rs")} - {"lib", "kunit", "nopool"}
    problems = ["%s.rs: in audit/layers or in mm/hmm/, and not in both" % f for f in files ^ set(order)]
    for user in order:
        text = read("%s/mm/hmm/%s.rs" % (src, user)) if user in files else ""
        used = set(re.findall(r"super::(\w+)", text))
        for block in re.findall(r"^use super::\{\n(.*?)^\};", text, re.M | re.S):
            used |= set(re.findall(r"^    (\w+)", block, re.M))
        for below in sorted(used & (files | {"kunit"}) - {user}):
            if below == "kunit" or order.index(below) > order.index(user):
                problems.append("%s.rs uses %s.rs, which is above it" % (user, below))
    fail_if(problems)


class Build:
    """A source tree, and what its build says of symbols."""

    def __init__(self, src, out, toolchain):
        self.src, self.out, self.tc = src, out, toolchain

    def tool(self, name, *args):
        return output(name + self.tc.suffix, *args, cwd=self.out)

    def undefined(self, path):
        """The C symbols that an object needs; those of Rust's have mangled names."""
        return {s for s in self.tool("llvm-nm", "-u", "-j", path).split() if not s.startswith("_R")}

    def symvers(self):
        """Of each symbol that a module can link to: EXPORT_SYMBOL or EXPORT_SYMBOL_GPL."""
        return {l.split("\t")[1]: l.split("\t")[3] for l in read(self.out + "/Module.symvers").splitlines()}

    def helpers(self):
        """What the C functions behind each rust_helper_* need: the relocations in its code."""
        needs, name = {}, None
        for line in self.tool("llvm-objdump", "-d", "-r", "--no-show-raw-insn", "rust/helpers/helpers.o").splitlines():
            label = re.match(r"[0-9a-f]+ <(\S+)>:$", line)
            reloc = re.match(r"\s+[0-9a-f]+:\s+R_\w+\s+([A-Za-z_]\w*)", line)
            if label:
                name = label.group(1)
                needs[name] = set()
            elif reloc:
                needs[name].add(reloc.group(1))
        for name in needs:      # An inline function that was not inlined is a function of the object.
            todo, needs[name] = needs[name], set()
            while todo:
                symbol = todo.pop()
                if symbol in needs and symbol not in needs[name]:
                    todo |= needs[symbol]
                needs[name].add(symbol)
            needs[name] -= set(needs)
        return needs

    def rust(self, tool, cmd, *args):
        """Run rustc or rustdoc on what it was compiled from, with the flags of the build."""
        words = shlex.split(read(os.path.join(self.out, cmd)).split("\n", 1)[0].split(":=", 1)[1])
        words = words[:words.index(";")] if ";" in words else words
        n = words.index("rustc")
        env = dict(self.tc.env, RUSTC_BOOTSTRAP="1", **dict(w.split("=", 1) for w in words[:n]))
        drop = ("--emit=", "--out-dir", "--remap-path-", *DRIVERS)
        words = [w for w in words[n + 1:] if not w.startswith(drop)]
        run([tool] + words + list(args), "audit-" + tool, cwd=self.out, env=env, what=tool)


def of_mm(b):
    """The C symbols that mm/ defines, and the helpers that are for it alone."""
    found = set(b.tool("llvm-nm", "-g", "-j", "--defined-only", "mm/built-in.a").split())
    for name in ("mm", "hmm"):
        found.update(re.findall(r"\brust_helper_\w+", read(os.path.join(b.src, "rust/helpers/%s.c" % name))))
    return found


def exported(b):
    """Every line is GPL-only and has a user in the driver."""
    symvers, needs = b.symvers(), set().union(*map(b.undefined, MODULES))
    fail_if(["%s is %s" % (s, symvers.get(s, "not exported")) for s in exports(b.src)
             if symvers.get(s) != "EXPORT_SYMBOL_GPL"]
            + ["%s: no driver links to it" % s for s in exports(b.src) if s not in needs])


def linked(b):
    """The driver links to nothing else but what it may; of mm only what its own pages need."""
    allowed, own = listed("driver-symbols", reasons=False), listed("driver-own-pages")
    mm, symvers = of_mm(b), b.symvers()
    needs = set().union(*map(b.undefined, MODULES)) - set(exports(b.src))
    fail_if(["%s: the driver links to it, and it is not in audit/driver-symbols" % s for s in needs - allowed - own]
            + ["%s is mm's" % s for s in ((needs | allowed) & mm) - own]
            + ["%s is in audit/driver-own-pages, and the driver does not link to it" % s for s in own - needs]
            + ["%s is in audit/driver-symbols, and nothing exports it" % s for s in allowed - set(symvers)])


def reached(b):
    """What the crate needs of C a module may need as well, or there is a reason that it may not."""
    helpers, symvers, excused = b.helpers(), b.symvers(), listed("unexported")
    needs = {s: "hmm.o" for s in b.undefined("rust/hmm.o")}
    for helper in [s for s in needs if s.startswith("rust_helper_")]:
        needs.update((s, helper) for s in helpers[helper])
    fail_if(["%s, which %s needs, is not exported, and not in audit/unexported" % (s, who)
             for s, who in needs.items() if s not in symvers and s not in excused]
            + ["%s is in audit/unexported, and is exported" % s for s in excused if s in symvers])


class Crate:
    """The public items of the crate as rustdoc lists them, and what the driver names of them as rustc
    sees it."""

    def __init__(self, b, tmp):
        b.rust("rustdoc", "rust/.hmm.o.cmd", "--output-format=json", "--output=" + tmp)
        doc = json.loads(read(tmp + "/hmm.json"))
        self.index, self.items, self.files, self.callers = doc["index"], {}, {}, {}
        self.walk(doc["root"])
        for directory, name in DRIVERS.items():
            command = "%s/.%s.o.cmd" % (directory, name)
            b.rust("rustc", command, "--emit=mir=%s/%s.mir" % (tmp, name), "-Zmir-opt-level=0",
                   "-Ztrim-diagnostic-paths=no")
            self.read_driver(b, directory, command)
            self.read_mir(read("%s/%s.mir" % (tmp, name)), None if directory == DUMMY else name + ".rs")
        self.text = "\n".join(self.files.values())
        # rustc sees to it that nothing is imported for nothing.
        self.named = set(re.findall(r"\bhmm::(\w+)", self.text))
        for names in re.findall(r"\bhmm::\{([^}]*)\}", self.text):
            self.named.update(re.findall(r"\w+", names))

    def inner(self, id_):
        return next(iter(self.index[str(id_)]["inner"].items()))

    def walk(self, id_, path=""):
        """Add an item and what is in it to self.items: path to (kind, id).

        The variants of an enum are as public as it, and no items of their own."""
        if str(id_) not in self.index or self.index[str(id_)]["visibility"] not in ("public", "default"):
            return
        kind, inner = self.inner(id_)
        name = path + (self.index[str(id_)]["name"] or "")
        if kind == "use":
            return self.walk(inner["id"])
        if kind == "module":
            below = [(i, "") for i in inner["items"]]
        elif kind == "impl":
            below = [(i, path) for i in ([] if inner["trait"] else inner["items"])]
        else:
            if kind not in ("struct", "enum", "trait", "function", "assoc_const", "assoc_type", "struct_field"):
                raise Failure("rustdoc lists %s, a %s, which the audit does not know" % (name, kind))
            self.items[name] = kind, id_
            below = [(i, name + "::") for i in inner.get("items", []) + inner.get("impls", [])]
            fields = inner["kind"] if kind == "struct" else ""
            if "plain" in fields:
                below += [(i, name + ".") for i in fields["plain"]["fields"]]
            elif "tuple" in fields:
                below += [(i, name + ".") for i in fields["tuple"]]
        for i, prefix in below:
            self.walk(i, prefix)

    def signature(self, id_):
        """The types, traits and associated types that an item names: ids, and names of the last."""
        found, todo = set(), [self.inner(id_)[1]]
        while todo:
            x = todo.pop()
            if isinstance(x, dict):
                if "args" in x:
                    found.add(x.get("id") if "id" in x else x.get("name"))
                todo += x.values()
            elif isinstance(x, list):
                todo += x
        return found

    def read_driver(self, b, directory, command):
        """A driver's text: the files that were compiled, without comments and KUnit suites."""
        compiled = read(os.path.join(b.out, command))
        for name in glob.glob("**/*.rs", root_dir=os.path.join(b.src, directory), recursive=True):
            if "%s/%s" % (directory, name) in compiled:
                text = re.sub(r"//.*", "", read(os.path.join(b.src, directory, name)))
                self.files[name] = re.sub(r"^#\[cfg\(CONFIG_\w*KUNIT\w*\)\]\n(?:.*\n)*?(?:\}|\S.*;)\n", "",
                                          text, flags=re.M)

    def read_mir(self, mir, file):
        """Which functions and constants of the crate a driver names: path to files."""
        one_file = bool(file)
        mir = re.sub(r"\bhmm::\w+::<impl hmm::(\w+)(?:<[^<>]*>)?>", r"hmm::\1", mir)
        for line in mir.splitlines():
            header = re.match(r"(?:fn|const|static) (\w+)::", line)
            file = header.group(1) + ".rs" if header and not one_file else file
            for path in re.findall(r"\bhmm::(\w+(?:::<(?:[^<>]|<[^<>]*>)*>)?::\w+)", line):
                self.callers.setdefault(re.sub(r"<.*>::", "", path), set()).add(file)

    def is_named(self, path, kind):
        owner, name = re.match(r"(?:(\w+)(?:::|\.))?(\w+)$", path).groups()
        if not owner:
            return path in self.named
        if kind == "struct_field":
            return bool(re.search(r"\.%s\b(?!\()|[{,]\s*%s\b" % (name, name), self.text))
        if self.items[owner][0] == "trait":
            return bool(re.search(r"\bimpl(<.*>)? %s for\b" % owner, self.text)
                        and re.search(r"^    (fn|type|const) %s\b" % name, self.text, re.M))
        return path in self.callers

    def unused(self):
        """What is public, not named by the driver and not in the signature of what is."""
        named = {p for p, (kind, _) in self.items.items() if self.is_named(p, kind)}
        signatures = set().union(*(self.signature(self.items[p][1]) for p in named))
        return {p for p, (kind, id_) in self.items.items() if p not in named and id_ not in signatures
                and not (kind == "assoc_type" and p.split("::")[1] in signatures)}

    def holders(self, type_):
        """The driver's files with a struct that owns a value of the type, and so drops it."""
        return {f for f, text in self.files.items() if re.search(r"^    [\w() ]+: ([\w:]+<)*%s\b" % type_, text, re.M)}

    def table(self, exports):
        """The exports: symbol, function of the crate, files of the driver that call it."""
        rows = []
        for symbol in exports:
            m = re.fullmatch(r"rust_hmm_([a-z]+)_(\w+)", symbol)
            type_, method = TYPES.get(m.group(1), "?") if m else "?", m.group(2) if m else symbol
            path = "%s::%s" % (type_, method)
            users = self.callers.get(path, ())
            if method == "drop":
                # A value that no struct owns is dropped where it is made.
                users = self.holders(type_) or self.callers.get("Mirror::" + m.group(1), ())
            if not users or (method != "drop" and path not in self.items):
                raise Failure("%s: the driver calls no %s" % (symbol, path))
            rows.append((symbol, "``%s``'s destructor" % type_ if method == "drop" else "``%s()``" % path,
                         ", ".join("``%s``" % u for u in sorted(users))))
        return rows


def rst_table(rows):
    """The table as the documentation has it."""
    rows = [("Symbol", "Function", "Called from")] + rows
    width = [max(len(r[i]) for r in rows) for i in range(3)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, width)).rstrip() for r in rows]
    rule = "  ".join("=" * w for w in width)
    return "\n".join([rule, lines[0], rule] + lines[1:] + [rule]) + "\n"


def documented(b, table):
    """The documentation has this table; it is in a file, to be copied from there."""
    write(logfile("audit-exports"), table)
    if table not in read(os.path.join(b.src, RST)):
        raise Failure("%s has not the table of the exports in %s" % (RST, logfile("audit-exports")))


def module(kernels, tmp, source, license_, log):
    """Link a module of its own with this license: the status, and what was said."""
    name, ending = os.path.splitext(source)
    write(tmp + "/" + source, read(LISTS + source).replace('"GPL"', '"%s"' % license_))
    write(tmp + "/Makefile", "obj-m := %s.o\n%s" % (name, "RUSTFLAGS_%s.o := --extern hmm\n" % name
                                                    if ending == ".rs" else ""))
    if os.path.exists(logfile(log)):
        os.unlink(logfile(log))
    status = kernels.make("um", "M=" + tmp, "modules", log=log, check=False)
    return status, read(logfile(log))


def licenses(tally, kernels, tmp):
    with tally.test("audit: a GPL module of Rust links to the exports"):
        if module(kernels, tmp + "/gpl", "mirror_user.rs", "GPL", "audit-gpl")[0]:
            raise Failure("it does not", logfile("audit-gpl"))
    with tally.test("audit: the same, proprietary, is refused"):
        status, said = module(kernels, tmp + "/proprietary", "mirror_user.rs", "Proprietary", "audit-proprietary")
        if not status or not re.search(r"modpost: .*GPL-only symbol 'rust_hmm_\w+'", said):
            raise Failure("modpost refuses it for no export of the crate", logfile("audit-proprietary"))
    with tally.test("audit: a proprietary module may get, put and map pages"):
        if module(kernels, tmp + "/pages", "page_user.c", "Proprietary", "audit-pages")[0]:
            raise Failure("it does not link any more", logfile("audit-pages"))


def export_audit(tally, kernels):
    """On the kernel of the demo, which has no KUnit and all else."""
    b = Build(kernels.src, kernels.dir("um"), kernels.tc)
    built = False
    with tally.test("audit: the kernel to look at has the crate, and no KUnit"):
        kernels.demo_kernel()
        built = True
        config = read(b.out + "/.config").splitlines()
        fail_if([c + " does not hold" for c in CONFIG if c not in config]
                + [c for c in config if c.startswith("CONFIG_KUNIT=")])
    if not built:
        return
    with tally.test("audit: the files of mm/hmm/ use only files below them"):
        layers(kernels.src)
    with tally.test("audit: every export is GPL-only and used by a driver"):
        exported(b)
    with tally.test("audit: the drivers link to nothing of mm's"):
        linked(b)
    with tally.test("audit: what the crate reaches, a module may reach"):
        reached(b)
    with scratch("audit") as tmp:
        crate = None
        with tally.test("audit: rustdoc and rustc list items and uses"):
            crate = Crate(b, tmp)
        with tally.test("audit: every public item is used by a driver"):
            if not crate:
                raise Failure("there is no list")
            excused, unused = listed("unused-items"), crate.unused()
            fail_if(["%s: the driver does not use it" % p for p in unused - excused]
                    + ["%s is in audit/unused-items, and is used or not there" % p for p in excused - unused])
        table = ""
        with tally.test("audit: the documentation has the table of the exports"):
            if not crate:
                raise Failure("there is no list")
            table = rst_table(crate.table(exports(b.src)))
            documented(b, table)
        for line in table.splitlines():
            say("    " + line)
        licenses(tally, kernels, tmp)
