// SPDX-License-Identifier: GPL-2.0

//! The placement policies of ranges of addresses.

use hmm::PageRange;
use kernel::{
    page::PAGE_MASK,
    prelude::*, //
};

/// Where a page migrates when the GPU faults it.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Policy {
    /// To the GPU's memory.
    #[default]
    Device,
    /// To system memory.
    System,
    /// The page stays where it is.
    None,
}

/// The policies of the ranges of an address space.
///
/// # Invariants
///
/// The ranges are in ascending order and do not overlap. No range has the default policy. Two
/// ranges that are adjacent have different policies.
pub(crate) struct Policies(KVVec<(PageRange, Policy)>);

impl Policies {
    /// The maximum number of ranges.
    const MAX: usize = 1024;

    /// All addresses have the default policy.
    pub(crate) const fn new() -> Self {
        Self(KVVec::new())
    }

    /// Returns the policy of the page at `va`, and the largest range around that page with the same
    /// policy.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] for the last page of the address space. It is in no range, since the end of a
    /// range must not wrap.
    pub(crate) fn at(&self, va: usize) -> Result<(PageRange, Policy)> {
        let mut start = 0;
        for (range, policy) in &self.0 {
            if range.contains(va) {
                return Ok((*range, *policy));
            }
            if va < range.start() {
                return Ok((PageRange::new(start, range.start())?, Policy::default()));
            }
            start = range.end();
        }
        let rest = PageRange::new(start, PAGE_MASK)?;
        match rest.contains(va) {
            true => Ok((rest, Policy::default())),
            false => Err(EINVAL),
        }
    }

    /// Sets the policy of `range`.
    ///
    /// # Errors
    ///
    /// [`ENOSPC`] if there would be too many ranges, [`ENOMEM`]. The policies do not change then.
    pub(crate) fn set(&mut self, range: PageRange, policy: Policy) -> Result {
        // The number of ranges grows by two at most: one old range may be split, and one is added.
        let mut new = Self(KVVec::with_capacity(self.0.len() + 2, GFP_KERNEL_ACCOUNT)?);
        let mut todo = Some((range, policy));

        for (old, its) in &self.0 {
            if old.start() < range.start() {
                new.push(old.start(), old.end().min(range.start()), *its)?;
            }
            if old.end() > range.end() {
                if let Some((range, policy)) = todo.take() {
                    new.push(range.start(), range.end(), policy)?;
                }
                new.push(old.start().max(range.end()), old.end(), *its)?;
            }
        }
        if let Some((range, policy)) = todo {
            new.push(range.start(), range.end(), policy)?;
        }
        if new.0.len() > Self::MAX {
            return Err(ENOSPC);
        }
        *self = new;
        Ok(())
    }

    /// Appends a range that starts at or after the end of the last one. Ranges with the default
    /// policy are not stored.
    fn push(&mut self, start: usize, end: usize, policy: Policy) -> Result {
        if policy == Policy::default() {
            return Ok(());
        }
        // INVARIANT: The caller appends ranges in ascending order. A range that is adjacent to the
        // last one and has the same policy is merged into it.
        if let Some((last, its)) = self.0.last_mut() {
            if *its == policy && last.end() == start {
                *last = PageRange::new(last.start(), end)?;
                return Ok(());
            }
        }
        self.0
            .push_within_capacity((PageRange::new(start, end)?, policy))?;
        Ok(())
    }
}

#[cfg(CONFIG_DUMMY_GPU_KUNIT_TEST)]
#[kunit_tests(dummy_gpu_policy)]
mod tests {
    use super::*;
    use kernel::page::PAGE_SIZE;

    fn pages(first: usize, end: usize) -> Result<PageRange> {
        PageRange::new(first * PAGE_SIZE, end * PAGE_SIZE)
    }

    #[test]
    fn the_default_holds_everywhere_at_first() -> Result {
        let all = PageRange::new(0, PAGE_MASK)?;

        for va in [0, PAGE_MASK - 1] {
            assert!(Policies::new().at(va)? == (all, Policy::Device));
        }
        assert_eq!(Policies::new().at(usize::MAX).err(), Some(EINVAL));
        Ok(())
    }

    #[test]
    fn a_policy_holds_for_its_range_and_no_further() -> Result {
        let mut policies = Policies::new();

        policies.set(pages(2, 4)?, Policy::System)?;
        let (second, fourth) = (2 * PAGE_SIZE, 4 * PAGE_SIZE);
        assert!(policies.at(second - 1)? == (pages(0, 2)?, Policy::Device));
        assert!(policies.at(second)? == (pages(2, 4)?, Policy::System));
        assert!(policies.at(fourth - 1)? == (pages(2, 4)?, Policy::System));
        let rest = PageRange::new(fourth, PAGE_MASK)?;
        assert!(policies.at(fourth)? == (rest, Policy::Device));
        Ok(())
    }

    #[test]
    fn ranges_that_meet_are_one() -> Result {
        let mut policies = Policies::new();

        policies.set(pages(1, 2)?, Policy::None)?;
        policies.set(pages(3, 4)?, Policy::None)?;
        assert_eq!(policies.0.len(), 2);
        policies.set(pages(2, 3)?, Policy::None)?;
        assert_eq!(policies.0.len(), 1);
        assert!(policies.at(PAGE_SIZE)? == (pages(1, 4)?, Policy::None));
        Ok(())
    }

    #[test]
    fn the_default_takes_no_room() -> Result {
        let mut policies = Policies::new();

        policies.set(pages(1, 9)?, Policy::System)?;
        policies.set(pages(3, 5)?, Policy::Device)?;
        assert_eq!(policies.0.len(), 2);
        policies.set(pages(0, 100)?, Policy::Device)?;
        assert!(policies.0.is_empty());
        Ok(())
    }

    #[test]
    fn too_many_ranges_are_enospc_and_change_nothing() -> Result {
        let mut policies = Policies::new();

        for n in 0..Policies::MAX {
            policies.set(pages(2 * n, 2 * n + 1)?, Policy::System)?;
        }
        let one_more = pages(2 * Policies::MAX, 2 * Policies::MAX + 1)?;
        assert_eq!(policies.set(one_more, Policy::System), Err(ENOSPC));
        assert_eq!(policies.0.len(), Policies::MAX);
        assert_eq!(policies.at(one_more.start())?.1, Policy::Device);
        Ok(())
    }

    #[test]
    fn any_sequence_agrees_with_a_plain_array() -> Result {
        const PAGES: usize = 40;

        let mut model = [Policy::Device; PAGES];
        let mut policies = Policies::new();
        let mut seed = 1u32;
        let mut random = |below: usize| {
            // The constants of Numerical Recipes.
            seed = seed.wrapping_mul(1664525).wrapping_add(1013904223);
            (seed >> 8) as usize % below
        };

        for _ in 0..1000 {
            let first = random(PAGES);
            let end = first + 1 + random(PAGES - first);
            let policy = [Policy::Device, Policy::System, Policy::None][random(3)];
            policies.set(pages(first, end)?, policy)?;
            model[first..end].fill(policy);
            for (page, expected) in model.iter().enumerate() {
                let (range, policy) = policies.at(page * PAGE_SIZE)?;
                assert_eq!(policy, *expected);
                let first = range.start() / PAGE_SIZE;
                let end = (range.end() / PAGE_SIZE).min(PAGES);
                assert!(model[first..end].iter().all(|other| other == expected));
                assert!(first == 0 || model[first - 1] != *expected);
                assert!(end == PAGES || model[end] != *expected);
            }
        }
        Ok(())
    }
}
