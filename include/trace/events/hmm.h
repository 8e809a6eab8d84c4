/* SPDX-License-Identifier: GPL-2.0 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM hmm

#if !defined(_TRACE_HMM_H) || defined(TRACE_HEADER_MULTI_READ)
#define _TRACE_HMM_H

#include <linux/tracepoint.h>

/**
 * hmm_fault_busy - a fault for a device has failed with -EBUSY
 * @va: the first address that the device needed
 * @retries: how often the fault was retried because an invalidation collided
 *
 * Invalidations kept colliding with the fault until the time for retries was
 * over.
 */
TRACE_EVENT(hmm_fault_busy,
	    TP_PROTO(unsigned long va, unsigned int retries),
	    TP_ARGS(va, retries),
	    TP_STRUCT__entry(__field(unsigned long, va)
			     __field(unsigned int, retries)),
	    TP_fast_assign(__entry->va = va;
			   __entry->retries = retries;),
	    TP_printk("va=0x%lx retries=%u", __entry->va, __entry->retries)
);

#ifdef CONFIG_RUST_HMM_DEVICE
/**
 * hmm_pool_full - a device's memory is full and no page in it can be evicted
 * @wanted: the number of pages that a migration needed
 *
 * The migration fails with -ENOMEM, unless some of its pages have migrated
 * already.
 */
TRACE_EVENT(hmm_pool_full,
	    TP_PROTO(unsigned long wanted),
	    TP_ARGS(wanted),
	    TP_STRUCT__entry(__field(unsigned long, wanted)),
	    TP_fast_assign(__entry->wanted = wanted;),
	    TP_printk("wanted=%lu", __entry->wanted)
);
#endif

#endif /* _TRACE_HMM_H */

/* This part must be outside protection */
#include <trace/define_trace.h>
