// SPDX-License-Identifier: GPL-2.0
/*
 * The memory map of SPARSEMEM_VMEMMAP, and what memory hotplug needs for it
 */

#include <linux/memory_hotplug.h>
#include <linux/mm.h>
#include <linux/vmalloc.h>
#include <as-layout.h>
#include <os.h>

static struct vm_struct vmemmap_vm = {
	.flags	= VM_SPARSE,
	.addr	= (void *)VMEMMAP_START,
	.size	= VMEMMAP_SIZE,
};

/*
 * The struct pages of all that can ever be physical memory: the host allocates
 * memory for those that are used, so nothing needs to be done for each section.
 */
void __init setup_vmemmap(void)
{
	os_map_lazy_memory((void *)VMEMMAP_START, VMEMMAP_SIZE, "memory map");
	vm_area_add_early(&vmemmap_vm);
}

int __meminit vmemmap_populate(unsigned long start, unsigned long end, int node,
			       struct vmem_altmap *altmap)
{
	/* The host can't be told to take its memory from the device. */
	if (altmap)
		return -EOPNOTSUPP;

	return 0;
}

#ifdef CONFIG_MEMORY_HOTPLUG
void __ref vmemmap_free(unsigned long start, unsigned long end,
			struct vmem_altmap *altmap)
{
	int err;

	/* What is freed shares no page with what stays. */
	BUILD_BUG_ON(!IS_ALIGNED(PAGES_PER_SUBSECTION * sizeof(struct page),
				 PAGE_SIZE));

	err = os_drop_lazy_memory((void *)start, end - start);
	if (err)
		pr_warn_once("Can't give the memory map back to the host: %d\n",
			     err);
}

/*
 * Only what there is at boot is mapped, with what memmap= sets aside. Memory
 * that the CPU can't access needs no mapping, so MEMORY_DEVICE_PRIVATE may be
 * anywhere.
 */
struct range arch_get_mappable_range(void)
{
	return (struct range) {
		.start	= 0,
		.end	= physmem_end() - 1,
	};
}

int arch_add_memory(int nid, u64 start, u64 size, struct mhp_params *params)
{
	if (!is_device_mem(start, size))
		return -EOPNOTSUPP;

	return __add_pages(nid, PHYS_PFN(start), PHYS_PFN(size), params);
}

void arch_remove_memory(u64 start, u64 size, struct vmem_altmap *altmap,
			struct dev_pagemap *pgmap)
{
	__remove_pages(PHYS_PFN(start), PHYS_PFN(size), altmap, pgmap);
}
#endif /* CONFIG_MEMORY_HOTPLUG */
