// SPDX-License-Identifier: GPL-2.0
/* What any module may do with a page, whatever its license; in Linux 4.18 put_page() was GPL-only. */

#include <linux/gfp.h>
#include <linux/highmem.h>
#include <linux/mm.h>
#include <linux/module.h>

static int __init page_user_init(void)
{
	struct page *page = alloc_page(GFP_KERNEL);

	if (!page)
		return -ENOMEM;
	get_page(page);
	clear_page(kmap(page));
	kunmap(page);
	put_page(page);
	put_page(page);
	return 0;
}
module_init(page_user_init);

MODULE_DESCRIPTION("A user of pages");
MODULE_LICENSE("Proprietary");
