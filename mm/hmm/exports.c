// SPDX-License-Identifier: GPL-2.0
/*
 * What a module can link to of the Rust crate hmm, all of it GPL-only.
 *
 * Each name is the export_name of a function of the crate; rustc checks its
 * type across the crates, the one here means nothing. A function without a
 * line here cannot be linked to by a module, and each line has a user in the
 * tree.
 */

#include <linux/export.h>

#define DECLARE_RUST(sym) extern int sym

/* mirror.rs */

DECLARE_RUST(rust_hmm_mirror_new);
EXPORT_SYMBOL_GPL(rust_hmm_mirror_new);

#ifdef CONFIG_RUST_HMM_DEVICE
DECLARE_RUST(rust_hmm_mirror_new_with_pool);
EXPORT_SYMBOL_GPL(rust_hmm_mirror_new_with_pool);
#endif

DECLARE_RUST(rust_hmm_mirror_drop);
EXPORT_SYMBOL_GPL(rust_hmm_mirror_drop);

DECLARE_RUST(rust_hmm_mirror_is_current);
EXPORT_SYMBOL_GPL(rust_hmm_mirror_is_current);

DECLARE_RUST(rust_hmm_mirror_task_size);
EXPORT_SYMBOL_GPL(rust_hmm_mirror_task_size);

DECLARE_RUST(rust_hmm_mirror_read);
EXPORT_SYMBOL_GPL(rust_hmm_mirror_read);

DECLARE_RUST(rust_hmm_mirror_write);
EXPORT_SYMBOL_GPL(rust_hmm_mirror_write);

/* fault.rs */

DECLARE_RUST(rust_hmm_mirror_fault);
EXPORT_SYMBOL_GPL(rust_hmm_mirror_fault);

#ifdef CONFIG_RUST_HMM_DEVICE

/* exclusive.rs */

DECLARE_RUST(rust_hmm_mirror_make_exclusive);
EXPORT_SYMBOL_GPL(rust_hmm_mirror_make_exclusive);

/* pool.rs */

DECLARE_RUST(rust_hmm_pool_new);
EXPORT_SYMBOL_GPL(rust_hmm_pool_new);

DECLARE_RUST(rust_hmm_pool_evict);
EXPORT_SYMBOL_GPL(rust_hmm_pool_evict);

DECLARE_RUST(rust_hmm_pool_drop);
EXPORT_SYMBOL_GPL(rust_hmm_pool_drop);

/* migrate.rs */

DECLARE_RUST(rust_hmm_mirror_migrate_to_device);
EXPORT_SYMBOL_GPL(rust_hmm_mirror_migrate_to_device);

DECLARE_RUST(rust_hmm_mirror_migrate_to_ram);
EXPORT_SYMBOL_GPL(rust_hmm_mirror_migrate_to_ram);

#endif
