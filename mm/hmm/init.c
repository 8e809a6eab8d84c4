// SPDX-License-Identifier: GPL-2.0
/*
 * Tells the Rust crate hmm when the code of a module goes.
 *
 * A driver that is written in Rust may leak what it has of the crate: that is
 * safe code. A mirror keeps the driver's module; a pool does not, or it could
 * not be removed. So what a module has leaked ends here, after the module's
 * exit and before its code goes.
 */

#include <linux/init.h>
#include <linux/module.h>
#include <linux/notifier.h>

/* mm/hmm/pool.rs */
void rust_hmm_init(void);
void rust_hmm_module_going(struct module *module);

static int hmm_module_notify(struct notifier_block *nb, unsigned long state,
			     void *module)
{
	if (state == MODULE_STATE_GOING)
		rust_hmm_module_going(module);
	return NOTIFY_DONE;
}

/* First, since code of the module runs. */
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
