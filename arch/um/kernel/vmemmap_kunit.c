// SPDX-License-Identifier: GPL-2.0
/*
 * KUnit tests of the memory map: that of device memory takes memory of the host
 * for as long as it is there, and no longer.
 */

#include <kunit/resource.h>
#include <kunit/test.h>
#include <linux/ioport.h>
#include <linux/memory_hotplug.h>
#include <linux/memremap.h>
#include <linux/mm.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>
#include <os.h>

/* In /proc/self/pagemap of the host */
#define HOST_PM_SWAP	BIT_ULL(62)
#define HOST_PM_PRESENT	BIT_ULL(63)

struct vmemmap_test {
	int pagemap;
};

static vm_fault_t vmemmap_test_migrate_to_ram(struct vm_fault *vmf)
{
	return VM_FAULT_SIGBUS;
}

static void vmemmap_test_folio_free(struct folio *folio)
{
}

static const struct dev_pagemap_ops vmemmap_test_ops = {
	.folio_free	= vmemmap_test_folio_free,
	.migrate_to_ram	= vmemmap_test_migrate_to_ram,
};

static void vmemmap_test_close(void *data)
{
	struct vmemmap_test *ctx = data;

	os_close_file(ctx->pagemap);
}

static void vmemmap_test_release(void *data)
{
	struct resource *res = data;

	release_mem_region(res->start, resource_size(res));
}

KUNIT_DEFINE_ACTION_WRAPPER(vmemmap_test_memunmap, memunmap_pages,
			    struct dev_pagemap *);

/* Takes a range for private memory, as the driver of a device does */
static u64 vmemmap_test_request(struct kunit *test, unsigned long size)
{
	struct resource *res;
	int err;

	res = request_free_mem_region(&iomem_resource, size, "um_vmemmap");
	KUNIT_ASSERT_NOT_ERR_OR_NULL(test, res);
	err = kunit_add_action_or_reset(test, vmemmap_test_release, res);
	KUNIT_ASSERT_EQ(test, err, 0);

	return res->start;
}

static struct dev_pagemap *vmemmap_test_map_as(struct kunit *test,
					       enum memory_type type,
					       u64 start, u64 size)
{
	struct dev_pagemap *pgmap;
	int err;

	pgmap = kunit_kzalloc(test, sizeof(*pgmap), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, pgmap);

	pgmap->type = type;
	pgmap->range.start = start;
	pgmap->range.end = start + size - 1;
	pgmap->nr_range = 1;
	pgmap->ops = &vmemmap_test_ops;
	pgmap->owner = test;

	KUNIT_ASSERT_NOT_ERR_OR_NULL(test, memremap_pages(pgmap, NUMA_NO_NODE));
	err = kunit_add_action_or_reset(test, vmemmap_test_memunmap, pgmap);
	KUNIT_ASSERT_EQ(test, err, 0);

	return pgmap;
}

static struct dev_pagemap *vmemmap_test_map(struct kunit *test, u64 start,
					    u64 size)
{
	return vmemmap_test_map_as(test, MEMORY_DEVICE_PRIVATE, start, size);
}

static void vmemmap_test_unmap(struct kunit *test, struct dev_pagemap *pgmap)
{
	kunit_release_action(test, vmemmap_test_memunmap, pgmap);
}

/* How many bytes of the host the struct pages of a range take */
static unsigned long vmemmap_test_usage(struct kunit *test, u64 start, u64 size)
{
	struct vmemmap_test *ctx = test->priv;
	unsigned long first = (unsigned long)pfn_to_page(PHYS_PFN(start));
	unsigned long last = (unsigned long)pfn_to_page(PHYS_PFN(start + size));
	unsigned long addr, nr = 0;
	u64 entry;

	for (addr = first; addr < last; addr += PAGE_SIZE) {
		int n = os_pread_file(ctx->pagemap, &entry, sizeof(entry),
				      addr / PAGE_SIZE * sizeof(entry));

		KUNIT_ASSERT_EQ(test, n, (int)sizeof(entry));
		if (entry & (HOST_PM_PRESENT | HOST_PM_SWAP))
			nr++;
	}

	return nr * PAGE_SIZE;
}

static void vmemmap_test_pages(struct kunit *test, struct dev_pagemap *pgmap)
{
	unsigned long pfn = PHYS_PFN(pgmap->range.start);
	unsigned long end = pfn + PHYS_PFN(range_len(&pgmap->range));
	unsigned long bad = 0;

	for (; pfn < end; pfn++) {
		struct page *page = pfn_to_page(pfn);

		if (!pfn_valid(pfn) || pfn_to_online_page(pfn) ||
		    page_to_pfn(page) != pfn || page_count(page) ||
		    !is_device_private_page(page) || page_pgmap(page) != pgmap)
			bad++;
	}

	KUNIT_EXPECT_EQ(test, bad, 0);
}

/* What is left is less than this, should the host map more than it is asked. */
#define LITTLE(size)	((size) / 16)

static void vmemmap_test_remove(struct kunit *test)
{
	const unsigned long size = SZ_1G;
	const unsigned long memmap = PHYS_PFN(size) * sizeof(struct page);
	struct dev_pagemap *pgmap;
	u64 start;
	int i;

	start = vmemmap_test_request(test, size);

	KUNIT_EXPECT_LT(test, vmemmap_test_usage(test, start, size),
			LITTLE(memmap));

	for (i = 0; i < 4; i++) {
		pgmap = vmemmap_test_map(test, start, size);
		vmemmap_test_pages(test, pgmap);
		KUNIT_EXPECT_EQ(test, vmemmap_test_usage(test, start, size),
				memmap);

		vmemmap_test_unmap(test, pgmap);
		KUNIT_EXPECT_FALSE(test, pfn_valid(PHYS_PFN(start)));
		KUNIT_EXPECT_LT(test, vmemmap_test_usage(test, start, size),
				LITTLE(memmap));
	}
}

/* Two ranges in a section, one of which is removed and comes back */
static void vmemmap_test_remove_part(struct kunit *test)
{
	const unsigned long size = PFN_PHYS(PAGES_PER_SECTION) / 2;
	const unsigned long memmap = PHYS_PFN(size) * sizeof(struct page);
	struct dev_pagemap *low, *high;
	u64 start;

	start = vmemmap_test_request(test, 2 * size);

	low = vmemmap_test_map(test, start, size);
	high = vmemmap_test_map(test, start + size, size);

	vmemmap_test_unmap(test, low);
	KUNIT_EXPECT_FALSE(test, pfn_valid(PHYS_PFN(start)));
	KUNIT_EXPECT_LT(test, vmemmap_test_usage(test, start, size),
			LITTLE(memmap));
	vmemmap_test_pages(test, high);

	low = vmemmap_test_map(test, start, size);
	vmemmap_test_pages(test, low);
	vmemmap_test_unmap(test, high);
	KUNIT_EXPECT_LT(test, vmemmap_test_usage(test, start + size, size),
			LITTLE(memmap));
	vmemmap_test_pages(test, low);
}

static void vmemmap_test_virt_addr_valid(struct kunit *test)
{
	void *p = kunit_kmalloc(test, PAGE_SIZE, GFP_KERNEL);
	void *v = vmalloc(PAGE_SIZE);

	KUNIT_EXPECT_NOT_NULL(test, p);
	KUNIT_EXPECT_NOT_NULL(test, v);
	KUNIT_EXPECT_TRUE(test, virt_addr_valid(p));
	KUNIT_EXPECT_FALSE(test, virt_addr_valid(v));
	KUNIT_EXPECT_FALSE(test, virt_addr_valid(virt_to_page(p)));
	KUNIT_EXPECT_FALSE(test, virt_addr_valid(NULL));
	vfree(v);
}

/* The CPU finds the same bytes when the memory has gone and come back. */
static void vmemmap_test_device_mem(struct kunit *test)
{
	const unsigned long size = SZ_2M;
	const u64 start = physmem_end() - size;
	struct dev_pagemap *pgmap;
	struct resource *res;
	unsigned long bad = 0;
	u64 *words, i;
	int err;

	if (!is_device_mem(start, size) || !IS_ALIGNED(start, size))
		kunit_skip(test, "wants an aligned 2 MiB set aside by memmap=");

	res = request_mem_region(start, size, "um_vmemmap");
	KUNIT_ASSERT_NOT_NULL(test, res);
	err = kunit_add_action_or_reset(test, vmemmap_test_release, res);
	KUNIT_ASSERT_EQ(test, err, 0);

	pgmap = vmemmap_test_map_as(test, MEMORY_DEVICE_COHERENT, start, size);
	words = page_address(pfn_to_page(PHYS_PFN(start)));
	for (i = 0; i < size / sizeof(*words); i++)
		words[i] = start + i;
	vmemmap_test_unmap(test, pgmap);
	KUNIT_EXPECT_FALSE(test, pfn_valid(PHYS_PFN(start)));

	pgmap = vmemmap_test_map_as(test, MEMORY_DEVICE_COHERENT, start, size);
	for (i = 0; i < size / sizeof(*words); i++)
		bad += words[i] != start + i;
	KUNIT_EXPECT_EQ(test, bad, 0);
	vmemmap_test_unmap(test, pgmap);
}

static int vmemmap_test_init(struct kunit *test)
{
	struct vmemmap_test *ctx;

	ctx = kunit_kzalloc(test, sizeof(*ctx), GFP_KERNEL);
	if (!ctx)
		return -ENOMEM;

	ctx->pagemap = os_open_file("/proc/self/pagemap",
				    of_cloexec(of_read(OPENFLAGS())), 0);
	if (ctx->pagemap < 0)
		kunit_skip(test, "no pagemap on the host (%d)", ctx->pagemap);

	test->priv = ctx;
	return kunit_add_action_or_reset(test, vmemmap_test_close, ctx);
}

static struct kunit_case vmemmap_test_cases[] = {
	KUNIT_CASE(vmemmap_test_remove),
	KUNIT_CASE(vmemmap_test_remove_part),
	KUNIT_CASE(vmemmap_test_virt_addr_valid),
	KUNIT_CASE(vmemmap_test_device_mem),
	{}
};

static struct kunit_suite vmemmap_test_suite = {
	.name		= "um_vmemmap",
	.init		= vmemmap_test_init,
	.test_cases	= vmemmap_test_cases,
};

kunit_test_suite(vmemmap_test_suite);
