/* SPDX-License-Identifier: GPL-2.0 */
#ifndef __ASM_UM_SPARSEMEM_H
#define __ASM_UM_SPARSEMEM_H

#ifdef CONFIG_SPARSEMEM
#define SECTION_SIZE_BITS	27
#define MAX_PHYSMEM_BITS	40
#endif /* CONFIG_SPARSEMEM */

#endif /* __ASM_UM_SPARSEMEM_H */
