// SPDX-License-Identifier: GPL-2.0

#include <linux/notifier.h>
#include <linux/suspend.h>

__rust_helper int rust_helper_notifier_from_errno(int err)
{
	return notifier_from_errno(err);
}

#ifndef CONFIG_PM_SLEEP
__rust_helper int rust_helper_register_pm_notifier(struct notifier_block *nb)
{
	return register_pm_notifier(nb);
}

__rust_helper int rust_helper_unregister_pm_notifier(struct notifier_block *nb)
{
	return unregister_pm_notifier(nb);
}
#endif
