// SPDX-License-Identifier: GPL-2.0
/*
 * The tracepoints of the Rust crate hmm.
 */

#define CREATE_TRACE_POINTS
#define CREATE_RUST_TRACE_POINTS
#include <trace/events/hmm.h>
