// SPDX-License-Identifier: GPL-2.0
/*
 * Initialise the Rust crate hmm, and end the pools that a module has leaked.
 *
 * Safe Rust code of a driver can leak a mirror or a pool. A mirror holds a
 * reference to the driver's module, so the code that it calls stays. A pool
 * holds none: a module that owns a pool could not be unloaded otherwise. So if
 * a module has leaked a pool, the crate ends the pool when the module is
 * unloaded, after the module's exit function and before its code is freed.
 */

#include <linux/init.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/notifier.h>

/* mm/hmm/device_pool.rs */
void rust_hmm_init(void);
void rust_hmm_module_going(struct module *module);

#ifdef CONFIG_RUST_HMM_KUNIT_TEST
#undef MODULE_PARAM_PREFIX
#define MODULE_PARAM_PREFIX "hmm_kunit."

/* The address of 4 MiB that the tests in kunit/coherent.rs may overwrite */
unsigned long rust_hmm_kunit_memory;
module_param_named(memory, rust_hmm_kunit_memory, ulong, 0444);
#endif

static int hmm_module_notify(struct notifier_block *nb, unsigned long state,
			     void *module)
{
	if (state == MODULE_STATE_GOING)
		rust_hmm_module_going(module);
	return NOTIFY_DONE;
}

/*
 * Ending a pool calls the module's code, so run before the notifiers that take
 * the module apart (tracepoints and jump labels, for example).
 */
static struct notifier_block hmm_module_nb = {
	.notifier_call = hmm_module_notify,
	.priority = INT_MAX,
};

static int __init hmm_initcall(void)
{
	rust_hmm_init();
	return register_module_notifier(&hmm_module_nb);
}
core_initcall(hmm_initcall);
