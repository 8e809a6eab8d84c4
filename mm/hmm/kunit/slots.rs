// SPDX-License-Identifier: GPL-2.0

//! Tests of `slots.rs`.

use super::super::{
    slots::{
        ChunkSlots,
        Node,
        Order,
        Slots, //
    }, //
};
use kernel::prelude::*;

const BLOCK: usize = Order::MAX.pages();

/// The node that pages come from.
const NODE: c_int = 3;

fn node() -> Result<Node> {
    Node::new(NODE)
}

/// Slots for up to `chunks` chunks of two blocks each, `filled` of which are present. The pfns of
/// chunk `n` start at `(n + 1) << 20`.
fn slots(chunks: usize, filled: usize) -> Result<Slots> {
    let mut slots = Slots::new(2 * BLOCK, chunks)?;
    for chunk in 0..filled {
        slots.add_chunk(ChunkSlots::new(2 * BLOCK, (chunk + 1) << 20)?)?;
    }
    Ok(slots)
}

#[kunit_tests(hmm_slots)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_make_no_blocks_are_einval() {
        assert_eq!(Slots::new(0, 1).err(), Some(EINVAL));
        assert_eq!(Slots::new(BLOCK, 0).err(), Some(EINVAL));
        assert_eq!(Slots::new(BLOCK + 1, 1).err(), Some(EINVAL));
        assert_eq!(Slots::new(BLOCK, usize::MAX).err(), Some(EINVAL));
        assert_eq!(Slots::new(BLOCK << 23, 1).err(), Some(EINVAL));
    }

    #[test]
    fn no_memory_until_a_chunk_comes_and_no_more_chunks_than_allowed() -> Result {
        let mut slots = slots(1, 0)?;
        assert!(slots.alloc(Order::PAGE).is_none());
        assert_eq!(slots.next_chunk(), Some(0));
        assert_eq!(
            slots.add_chunk(ChunkSlots::new(BLOCK, 0)?).err(),
            Some(EINVAL)
        );
        slots.add_chunk(ChunkSlots::new(2 * BLOCK, 0)?)?;
        assert_eq!(slots.free_pages(), 2 * BLOCK);
        assert_eq!(slots.next_chunk(), None);
        let chunk = ChunkSlots::new(2 * BLOCK, 0)?;
        assert_eq!(slots.add_chunk(chunk).err(), Some(ENOSPC));
        Ok(())
    }

    #[test]
    fn each_page_is_given_once_and_in_ascending_order() -> Result {
        let mut slots = slots(2, 2)?;
        // The last chunk is used first, each chunk from its start.
        for n in 0..4 * BLOCK {
            let page = (n + 2 * BLOCK) % (4 * BLOCK);
            assert_eq!(slots.alloc(Order::PAGE), Some(page));
        }
        assert_eq!(slots.free_pages(), 0);
        assert!(slots.alloc(Order::PAGE).is_none());
        Ok(())
    }

    #[test]
    fn blocks_are_aligned_and_merge_again() -> Result {
        let mut slots = slots(1, 1)?;
        let page = slots.alloc(Order::PAGE);
        let block = slots.alloc(Order::MAX);
        assert_eq!(page, Some(0));
        assert_eq!(block, Some(BLOCK));
        assert!(slots.alloc(Order::MAX).is_none());
        slots.free(0)?;
        assert_eq!(slots.alloc(Order::MAX), Some(0));
        assert_eq!(slots.free_pages(), 0);
        slots.free(BLOCK)?;
        assert_eq!(slots.free_pages(), BLOCK);
        Ok(())
    }

    #[test]
    fn what_is_not_in_use_is_not_freed() -> Result {
        let mut slots = slots(1, 1)?;
        assert_eq!(slots.free(0), Err(EINVAL));
        assert_eq!(slots.alloc(Order::MAX), Some(0));
        assert_eq!(slots.free(1), Err(EINVAL));
        assert_eq!(slots.free(2 * BLOCK), Err(EINVAL));
        slots.free(0)?;
        assert_eq!(slots.free(0), Err(EINVAL));
        assert_eq!(slots.free_pages(), 2 * BLOCK);
        Ok(())
    }

    #[test]
    fn the_oldest_come_first_and_each_once_a_round() -> Result {
        let mut slots = slots(1, 1)?;
        for page in 0..5 {
            assert_eq!(slots.alloc(Order::PAGE), Some(page));
            slots.mark_used(page, node()?);
        }
        slots.free(1)?;
        let pfn = |page: usize| (1 << 20) + page;
        let mut pfns = [0; 3];
        assert_eq!(slots.rotate_oldest(&mut pfns), (3, Order::PAGE));
        assert_eq!(pfns, [pfn(0), pfn(2), pfn(3)]);
        // A page that is freed and used again is younger than the pages that were rotated.
        assert_eq!(slots.alloc(Order::PAGE), Some(1));
        slots.mark_used(1, node()?);
        let mut pfns = [0; 9];
        assert_eq!(slots.rotate_oldest(&mut pfns), (5, Order::PAGE));
        assert_eq!(pfns[..5], [pfn(4), pfn(0), pfn(2), pfn(3), pfn(1)]);
        Ok(())
    }

    #[test]
    fn the_pages_of_a_split_block_take_its_place_and_merge_again() -> Result {
        let mut slots = slots(1, 1)?;
        let pfn = |page: usize| (1 << 20) + page;
        let block = slots.alloc(Order::MAX).ok_or(ENOMEM)?;
        let other = slots.alloc(Order::PAGE).ok_or(ENOMEM)?;
        slots.mark_used(block, node()?);
        slots.mark_used(other, node()?);
        assert_eq!(slots.rotate_oldest(&mut [0; 4]), (1, Order::MAX));
        assert_eq!(slots.folio_order(block), Order::MAX);
        slots.split(block);
        assert_eq!(slots.folio_order(block), Order::PAGE);
        assert_eq!(slots.node(block + 7), Some(node()?));
        let mut pfns = [0; 3];
        assert_eq!(slots.rotate_oldest(&mut pfns), (3, Order::PAGE));
        assert_eq!(pfns, [pfn(other), pfn(block), pfn(block + 1)]);
        for page in Iterator::chain(block..block + BLOCK, [other]) {
            slots.mark_unused(page);
            slots.free(page)?;
        }
        assert!(slots.is_idle());
        assert!(slots.alloc(Order::MAX).is_some() && slots.alloc(Order::MAX).is_some());
        Ok(())
    }

    #[test]
    fn a_page_in_use_keeps_its_node_while_it_is_in_use() -> Result {
        let mut slots = slots(1, 1)?;
        for (page, nid) in [(0, 1), (1, 2)] {
            assert_eq!(slots.alloc(Order::PAGE), Some(page));
            slots.mark_used(page, Node::new(nid)?);
        }
        // rotate_oldest() moves the pages in the list, but keeps their nodes.
        assert_eq!(slots.rotate_oldest(&mut [0; 1]), (1, Order::PAGE));
        for (page, nid) in [(0, 1), (1, 2)] {
            assert_eq!(slots.node(page).map(Node::nid), Some(nid));
        }
        slots.mark_unused(0);
        slots.mark_used(0, node()?);
        assert_eq!(slots.node(0).map(Node::nid), Some(NODE));
        assert_eq!(Node::new(1 << 15).err(), Some(EINVAL));
        Ok(())
    }

    #[test]
    fn nothing_in_use_has_no_oldest() -> Result {
        let mut slots = slots(1, 1)?;
        assert_eq!(slots.rotate_oldest(&mut [0; 2]), (0, Order::PAGE));
        assert_eq!(slots.alloc(Order::PAGE), Some(0));
        slots.mark_used(0, node()?);
        slots.free(0)?;
        assert_eq!(slots.rotate_oldest(&mut [0; 2]), (0, Order::PAGE));
        Ok(())
    }

    #[test]
    fn what_is_on_its_way_is_not_in_use() -> Result {
        let mut slots = slots(1, 1)?;
        for page in 0..2 {
            assert_eq!(slots.alloc(Order::PAGE), Some(page));
        }
        assert!(slots.node(0).is_none());
        assert_eq!(slots.rotate_oldest(&mut [0; 2]), (0, Order::PAGE));
        slots.mark_used(0, node()?);
        slots.mark_used(1, node()?);
        assert!(slots.node(0).is_some());
        assert_eq!(slots.rotate_oldest(&mut [0; 2]), (2, Order::PAGE));
        slots.mark_unused(0);
        assert!(slots.node(0).is_none());
        assert_eq!(slots.rotate_oldest(&mut [0; 2]), (1, Order::PAGE));
        // A page can be freed whether it is marked used or unused, and is then neither.
        slots.free(0)?;
        slots.free(1)?;
        slots.mark_used(1, node()?);
        assert!(slots.node(1).is_none());
        assert_eq!(slots.free_pages(), 2 * BLOCK);
        Ok(())
    }

    #[test]
    fn any_sequence_agrees_with_a_plain_array() -> Result {
        const PAGES: usize = 4 * BLOCK;
        let mut slots = slots(2, 2)?;
        let mut used: KVec<bool> = KVec::from_elem(false, PAGES, GFP_KERNEL)?;
        let mut blocks: KVec<(usize, usize)> = KVec::with_capacity(PAGES, GFP_KERNEL)?;
        let mut seed = 1u32;
        let mut random = |below: usize| {
            // The constants of Numerical Recipes.
            seed = seed.wrapping_mul(1664525).wrapping_add(1013904223);
            (seed >> 8) as usize % below
        };
        let orders = [Order::PAGE, Order::PAGE, Order::PAGE, Order::MAX];

        for _ in 0..4000 {
            if random(5) < 3 {
                let order = orders[random(orders.len())];
                let Some(page) = slots.alloc(order) else {
                    continue;
                };
                assert_eq!(page % order.pages(), 0);
                for slot in &mut used[page..page + order.pages()] {
                    assert!(!core::mem::replace(slot, true));
                }
                blocks.push_within_capacity((page, order.pages()))?;
            } else if !blocks.is_empty() {
                let (page, pages) = blocks.remove(random(blocks.len()))?;
                slots.free(page)?;
                used[page..page + pages].fill(false);
            }
            let free = used.iter().filter(|used| !**used).count();
            assert_eq!(slots.free_pages(), free);
        }
        for (page, _) in blocks {
            slots.free(page)?;
        }
        // All blocks have merged again.
        for _ in 0..PAGES / BLOCK {
            assert!(slots.alloc(Order::MAX).is_some());
        }
        Ok(())
    }
}
