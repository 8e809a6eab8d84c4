// SPDX-License-Identifier: GPL-2.0
/*
 * The functions of the Rust crate hmm that modules can link to, all GPL-only.
 *
 * Each symbol is the export_name of a function of the crate. The type int below
 * is a placeholder: rustc checks the real types when it compiles a driver
 * against the crate. A module can link to no function of the crate without a
 * line here. Every function here has a user in the tree.
 */

#include <linux/export.h>

#define DECLARE_RUST(sym) extern int sym

/* binding.rs */

DECLARE_RUST(rust_hmm_binding_new);
EXPORT_SYMBOL_GPL(rust_hmm_binding_new);

DECLARE_RUST(rust_hmm_binding_end);
EXPORT_SYMBOL_GPL(rust_hmm_binding_end);

DECLARE_RUST(rust_hmm_device_drop);
EXPORT_SYMBOL_GPL(rust_hmm_device_drop);

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

DECLARE_RUST(rust_hmm_mirror_update);
EXPORT_SYMBOL_GPL(rust_hmm_mirror_update);

/* mirrored_mm.rs */

DECLARE_RUST(rust_hmm_mirror_mm);
EXPORT_SYMBOL_GPL(rust_hmm_mirror_mm);

DECLARE_RUST(rust_hmm_mm_charge);
EXPORT_SYMBOL_GPL(rust_hmm_mm_charge);

DECLARE_RUST(rust_hmm_mm_drop);
EXPORT_SYMBOL_GPL(rust_hmm_mm_drop);

/* fault.rs */

DECLARE_RUST(rust_hmm_mm_fault);
EXPORT_SYMBOL_GPL(rust_hmm_mm_fault);

#ifdef CONFIG_RUST_HMM_DEVICE

/* exclusive.rs */

DECLARE_RUST(rust_hmm_mm_make_exclusive);
EXPORT_SYMBOL_GPL(rust_hmm_mm_make_exclusive);

/* copy.rs */

DECLARE_RUST(rust_hmm_ram_read);
EXPORT_SYMBOL_GPL(rust_hmm_ram_read);

DECLARE_RUST(rust_hmm_new_write);
EXPORT_SYMBOL_GPL(rust_hmm_new_write);

DECLARE_RUST(rust_hmm_batch_copy_by_cpu);
EXPORT_SYMBOL_GPL(rust_hmm_batch_copy_by_cpu);

/* device_pool.rs */

DECLARE_RUST(rust_hmm_pool_new);
EXPORT_SYMBOL_GPL(rust_hmm_pool_new);

DECLARE_RUST(rust_hmm_pool_evict);
EXPORT_SYMBOL_GPL(rust_hmm_pool_evict);

DECLARE_RUST(rust_hmm_pool_lost);
EXPORT_SYMBOL_GPL(rust_hmm_pool_lost);

DECLARE_RUST(rust_hmm_pool_drop);
EXPORT_SYMBOL_GPL(rust_hmm_pool_drop);

/* migrate.rs */

DECLARE_RUST(rust_hmm_mm_migrate_to_device);
EXPORT_SYMBOL_GPL(rust_hmm_mm_migrate_to_device);

DECLARE_RUST(rust_hmm_mm_migrate_to_ram);
EXPORT_SYMBOL_GPL(rust_hmm_mm_migrate_to_ram);

#endif
