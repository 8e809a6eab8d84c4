// SPDX-License-Identifier: GPL-2.0

#include <linux/highmem.h>
#include <linux/hmm.h>
#include <linux/memcontrol.h>
#include <linux/memremap.h>
#include <linux/migrate.h>
#include <linux/mmu_context.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/pagemap.h>
#include <linux/sched/mm.h>
#include <linux/secretmem.h>
#include <linux/uaccess.h>
#include <linux/userfaultfd_k.h>

__rust_helper struct page *rust_helper_hmm_pfn_to_page(unsigned long hmm_pfn)
{
	return hmm_pfn_to_page(hmm_pfn);
}

#ifndef CONFIG_MEMCG
__rust_helper struct mem_cgroup *
rust_helper_get_mem_cgroup_from_mm(struct mm_struct *mm)
{
	return get_mem_cgroup_from_mm(mm);
}
#endif

__rust_helper struct mem_cgroup *
rust_helper_set_active_memcg(struct mem_cgroup *memcg)
{
	return set_active_memcg(memcg);
}

__rust_helper void rust_helper_mem_cgroup_put(struct mem_cgroup *memcg)
{
	mem_cgroup_put(memcg);
}

__rust_helper void rust_helper_pagefault_disable(void)
{
	pagefault_disable();
}

__rust_helper void rust_helper_pagefault_enable(void)
{
	pagefault_enable();
}

__rust_helper bool rust_helper_pagefault_disabled(void)
{
	return pagefault_disabled();
}

__rust_helper bool rust_helper_is_zero_pfn(unsigned long pfn)
{
	return is_zero_pfn(pfn);
}

__rust_helper struct page *rust_helper_pfn_to_page(unsigned long pfn)
{
	return pfn_to_page(pfn);
}

__rust_helper unsigned long rust_helper_page_to_pfn(struct page *page)
{
	return page_to_pfn(page);
}

__rust_helper void rust_helper_memcpy_from_page(char *to, struct page *page,
						size_t offset, size_t len)
{
	memcpy_from_page(to, page, offset, len);
}

__rust_helper void rust_helper_memcpy_to_page(struct page *page, size_t offset,
					      const char *from, size_t len)
{
	memcpy_to_page(page, offset, from, len);
}

__rust_helper struct folio *rust_helper_page_folio(struct page *page)
{
	return page_folio(page);
}

__rust_helper bool rust_helper_vma_is_secretmem(struct vm_area_struct *vma)
{
	return vma_is_secretmem(vma);
}

__rust_helper bool
rust_helper_arch_vma_access_permitted(struct vm_area_struct *vma, bool write,
				      bool execute, bool foreign)
{
	return arch_vma_access_permitted(vma, write, execute, foreign);
}

__rust_helper bool rust_helper_secretmem_mapping(struct address_space *mapping)
{
	return secretmem_mapping(mapping);
}

__rust_helper bool rust_helper_is_zone_device_page(const struct page *page)
{
	return is_zone_device_page(page);
}

__rust_helper bool rust_helper_is_device_coherent_page(const struct page *page)
{
	return is_device_coherent_page(page);
}

__rust_helper bool rust_helper_is_pci_p2pdma_page(const struct page *page)
{
	return is_pci_p2pdma_page(page);
}

__rust_helper bool rust_helper_try_module_get(struct module *module)
{
	return try_module_get(module);
}

__rust_helper void rust_helper_module_put(struct module *module)
{
	module_put(module);
}

#ifdef CONFIG_MMU_NOTIFIER
__rust_helper void
rust_helper_mmu_interval_set_seq(struct mmu_interval_notifier *interval_sub,
				 unsigned long cur_seq)
{
	mmu_interval_set_seq(interval_sub, cur_seq);
}

__rust_helper bool
rust_helper_mmu_interval_read_retry(struct mmu_interval_notifier *interval_sub,
				    unsigned long seq)
{
	return mmu_interval_read_retry(interval_sub, seq);
}

__rust_helper bool
rust_helper_mmu_notifier_range_blockable(const struct mmu_notifier_range *range)
{
	return mmu_notifier_range_blockable(range);
}
#endif

#ifdef CONFIG_DEVICE_PRIVATE
__rust_helper int rust_helper_numa_mem_id(void)
{
	return numa_mem_id();
}

__rust_helper void rust_helper_copy_page(void *to, void *from)
{
	copy_page(to, from);
}

__rust_helper void *rust_helper_page_address(const struct page *page)
{
	return page_address(page);
}

__rust_helper struct folio *
rust_helper___folio_alloc_node(gfp_t gfp, unsigned int order, int nid)
{
	return __folio_alloc_node(gfp, order, nid);
}

__rust_helper void rust_helper_folio_lock(struct folio *folio)
{
	folio_lock(folio);
}

__rust_helper void rust_helper_folio_get(struct folio *folio)
{
	folio_get(folio);
}

__rust_helper void rust_helper_folio_put(struct folio *folio)
{
	folio_put(folio);
}

__rust_helper bool rust_helper_folio_try_get(struct folio *folio)
{
	return folio_try_get(folio);
}

__rust_helper bool rust_helper_folio_trylock(struct folio *folio)
{
	return folio_trylock(folio);
}

__rust_helper bool rust_helper_folio_test_large(const struct folio *folio)
{
	return folio_test_large(folio);
}

__rust_helper int rust_helper_folio_entire_mapcount(const struct folio *folio)
{
	return folio_entire_mapcount(folio);
}

/* PMD_ORDER is not a constant on all architectures. */
__rust_helper unsigned int rust_helper_pmd_order(void)
{
	return PMD_ORDER;
}

__rust_helper unsigned long
rust_helper_thp_vma_allowable_orders(struct vm_area_struct *vma,
				     vm_flags_t vm_flags, enum tva_type type,
				     unsigned long orders)
{
	return thp_vma_allowable_orders(vma, vm_flags, type, orders);
}

__rust_helper bool rust_helper_is_huge_zero_pfn(unsigned long pfn)
{
	return is_huge_zero_pfn(pfn);
}

__rust_helper int rust_helper_split_folio(struct folio *folio)
{
	return split_folio(folio);
}

__rust_helper bool rust_helper_folio_mapped(const struct folio *folio)
{
	return folio_mapped(folio);
}

__rust_helper struct folio *
rust_helper_vma_alloc_folio(gfp_t gfp, int order, struct vm_area_struct *vma,
			    unsigned long addr)
{
	return vma_alloc_folio(gfp, order, vma, addr);
}

__rust_helper bool rust_helper_vma_is_anonymous(struct vm_area_struct *vma)
{
	return vma_is_anonymous(vma);
}

__rust_helper bool rust_helper_PageAnon(const struct page *page)
{
	return PageAnon(page);
}

__rust_helper bool rust_helper_userfaultfd_rwp(struct vm_area_struct *vma)
{
	return userfaultfd_rwp(vma);
}

__rust_helper bool rust_helper_is_device_private_page(const struct page *page)
{
	return is_device_private_page(page);
}

__rust_helper int rust_helper_phys_to_target_node(u64 start)
{
	return phys_to_target_node(start);
}

__rust_helper struct dev_pagemap *
rust_helper_page_pgmap(const struct page *page)
{
	return page_pgmap(page);
}

__rust_helper void rust_helper_zone_device_folio_init(struct folio *folio,
						      struct dev_pagemap *pgmap,
						      unsigned int order)
{
	zone_device_folio_init(folio, pgmap, order);
}

__rust_helper void *rust_helper_folio_zone_device_data(const struct folio *folio)
{
	return folio_zone_device_data(folio);
}

__rust_helper void rust_helper_folio_set_zone_device_data(struct folio *folio,
							  void *data)
{
	folio_set_zone_device_data(folio, data);
}

__rust_helper unsigned long rust_helper_migrate_pfn(unsigned long pfn)
{
	return migrate_pfn(pfn);
}

__rust_helper struct page *rust_helper_migrate_pfn_to_page(unsigned long mpfn)
{
	return migrate_pfn_to_page(mpfn);
}
#endif
