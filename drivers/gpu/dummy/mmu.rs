// SPDX-License-Identifier: GPL-2.0

//! The GPU's page table: which pages of a process the GPU may access, and how.
//!
//! The table has virtual addresses and permissions only. A software device has no use for physical
//! addresses, and `hmm` does not give them to drivers. This file uses the page types of `hmm`
//! ([`ReadPage`], [`WritePage`]), which prove that a page may be mapped, and no other file of the
//! driver.
//!
//! A table spans 2 MiB and consists of three bitmaps. It is allocated before the lock of the page
//! table is taken and passed to the page table while the lock is held, so mapping a page cannot
//! fail.

use core::cmp::Ordering::{
    Equal,
    Greater,
    Less, //
};
#[cfg(CONFIG_RUST_HMM_DEVICE)]
use hmm::ExclusivePage;
use hmm::{
    Access,
    PageRange,
    ReadPage,
    WritePage, //
};
use kernel::{
    page::{
        PAGE_SHIFT,
        PAGE_SIZE, //
    },
    prelude::*,
    rbtree::{
        Entry,
        RBTree,
        RBTreeNodeReservation, //
    },
    sizes::SZ_2M, //
};

/// The number of bytes that one table spans.
pub(crate) const TABLE_SIZE: usize = SZ_2M;
const TABLE_SHIFT: u32 = TABLE_SIZE.trailing_zeros();

/// The number of pages that one table spans, as a power of two.
pub(crate) const TABLE_ORDER: u32 = TABLE_SHIFT - PAGE_SHIFT as u32;
const TABLE_PAGES: usize = 1 << TABLE_ORDER;
const WORDS: usize = TABLE_PAGES.div_ceil(u64::BITS as usize);

static_assert!(TABLE_SIZE >= PAGE_SIZE);

/// One bit for each page of a table.
type Bits = [u64; WORDS];

/// Returns whether the bit of `page` is set.
fn is_set(bits: &Bits, page: usize) -> bool {
    bits.get(page / 64)
        .is_some_and(|word| word & (1 << (page % 64)) != 0)
}

/// Sets the bit of `page`.
fn set(bits: &mut Bits, page: usize) {
    if let Some(word) = bits.get_mut(page / 64) {
        *word |= 1 << (page % 64);
    }
}

/// Returns a mask of those bits of word `index` that belong to the pages from `first` to `end`,
/// exclusive.
fn mask(index: usize, first: usize, end: usize) -> u64 {
    let low = first.saturating_sub(index * 64).min(64) as u32;
    let high = end.saturating_sub(index * 64).min(64) as u32;
    if low < high {
        (u64::MAX >> (64 - (high - low))) << low
    } else {
        0
    }
}

/// Clears the bits of the pages from `first` to `end`, exclusive. Returns how many of them were
/// set.
fn clear(bits: &mut Bits, first: usize, end: usize) -> usize {
    let mut cleared = 0;
    for (index, word) in bits.iter_mut().enumerate() {
        let mask = mask(index, first, end);
        cleared += (*word & mask).count_ones() as usize;
        *word &= !mask;
    }
    cleared
}

/// The addresses of the table that has the entry of `va`.
#[cfg_attr(
    not(any(CONFIG_RUST_HMM_DEVICE, CONFIG_DUMMY_GPU_DMIRROR)),
    expect(dead_code)
)]
pub(crate) fn table_range(va: usize) -> Result<PageRange> {
    PageRange::from_len(va / TABLE_SIZE * TABLE_SIZE, TABLE_SIZE)
}

/// The entries for [`TABLE_SIZE`] bytes of virtual addresses.
///
/// # Invariants
///
/// Every page in `exclusive` is also in `writable`, and every page in `writable` is also in
/// `present`.
struct Table {
    present: Bits,
    writable: Bits,
    exclusive: Bits,
}

impl Table {
    const EMPTY: Self = Self {
        present: [0; WORDS],
        writable: [0; WORDS],
        exclusive: [0; WORDS],
    };

    fn is_empty(&self) -> bool {
        self.present.iter().all(|word| *word == 0)
    }

    /// Maps `page` for `access`. Mapping a writable page for reading makes it read-only.
    ///
    /// An exclusive page keeps its mapping until it is unmapped: a fault that started before the
    /// page became exclusive may be committed only afterwards.
    ///
    /// Returns whether the page was unmapped before.
    fn map(&mut self, page: usize, access: Access) -> bool {
        let new = !is_set(&self.present, page);

        if is_set(&self.exclusive, page) {
            return new;
        }
        set(&mut self.present, page);
        match access {
            // INVARIANT: `page` was added to `present` above.
            Access::Write => set(&mut self.writable, page),
            // INVARIANT: `page` is not in `exclusive`, as checked above.
            Access::Read => {
                clear(&mut self.writable, page, page + 1);
            }
        }
        new
    }

    /// Maps `page` for reading, writing and atomic operations. Returns whether it was unmapped
    /// before.
    #[cfg(CONFIG_RUST_HMM_DEVICE)]
    fn map_exclusive(&mut self, page: usize) -> bool {
        let new = self.map(page, Access::Write);

        // INVARIANT: `map()` has added `page` to `writable`, or `page` was in `exclusive` before.
        set(&mut self.exclusive, page);
        new
    }

    fn allows(&self, page: usize, access: Access) -> bool {
        match access {
            Access::Read => is_set(&self.present, page),
            Access::Write => is_set(&self.writable, page),
        }
    }

    /// Unmaps the pages from `first` to `end`, exclusive. Returns how many were mapped.
    fn unmap(&mut self, first: usize, end: usize) -> usize {
        // INVARIANT: The same pages are removed from all three bitmaps.
        clear(&mut self.exclusive, first, end);
        clear(&mut self.writable, first, end);
        clear(&mut self.present, first, end)
    }
}

/// The key of the table for `va`.
fn key_of(va: usize) -> usize {
    va >> TABLE_SHIFT
}

/// The index of the page that contains `va` in its table.
fn index_of(va: usize) -> usize {
    (va % TABLE_SIZE) >> PAGE_SHIFT
}

/// Returns the pages of table `key` that are in `range`, as the indices of the first one and of the
/// one after the last.
fn part(key: usize, range: PageRange) -> (usize, usize) {
    let last = range.end() - 1;
    let first_page = match key.cmp(&key_of(range.start())) {
        Less => TABLE_PAGES,
        Equal => index_of(range.start()),
        Greater => 0,
    };
    let end_page = match key.cmp(&key_of(last)) {
        Less => TABLE_PAGES,
        Equal => index_of(last) + 1,
        Greater => 0,
    };
    (first_page, end_page)
}

/// Memory for a table. It is allocated before the lock of the page table is taken.
pub(crate) struct SpareTable(RBTreeNodeReservation<usize, Table>);

impl SpareTable {
    /// Allocates memory for one table. May sleep.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(RBTreeNodeReservation::new(GFP_KERNEL_ACCOUNT)?))
    }
}

/// The GPU's page table for one process.
///
/// Its methods neither sleep nor allocate, so that a spinlock can protect it.
pub(crate) struct Mmu {
    tables: RBTree<usize, Table>,
}

impl Mmu {
    /// Creates an empty page table.
    pub(crate) fn new() -> Self {
        Self {
            tables: RBTree::new(),
        }
    }

    /// Returns the table for `va`, to map pages in it. If there is no such table yet, `spare`
    /// becomes the table.
    pub(crate) fn table(&mut self, va: usize, spare: SpareTable) -> TableMut<'_> {
        let key = key_of(va);
        let table = match self.tables.entry(key) {
            Entry::Occupied(table) => table.into_mut(),
            Entry::Vacant(vacant) => vacant.insert(Table::EMPTY, spare.0),
        };

        TableMut { key, table }
    }

    /// Whether the GPU may access the page that contains `va` with `access`.
    pub(crate) fn lookup(&self, va: usize, access: Access) -> bool {
        self.tables
            .get(&key_of(va))
            .is_some_and(|table| table.allows(index_of(va), access))
    }

    /// Whether the page that contains `va` is exclusive to the GPU.
    pub(crate) fn is_exclusive(&self, va: usize) -> bool {
        self.tables
            .get(&key_of(va))
            .is_some_and(|table| is_set(&table.exclusive, index_of(va)))
    }

    /// Whether any page of `range` is exclusive to the GPU.
    #[cfg(CONFIG_DUMMY_GPU_DMIRROR)]
    pub(crate) fn any_exclusive(&self, range: PageRange) -> bool {
        self.tables.iter().any(|(&key, table)| {
            let (first, end) = part(key, range);
            let mut words = table.exclusive.iter().enumerate();
            words.any(|(index, word)| word & mask(index, first, end) != 0)
        })
    }

    /// Unmaps `range` and returns the number of pages that were mapped.
    pub(crate) fn unmap(&mut self, range: PageRange) -> usize {
        let last = key_of(range.end() - 1);
        let mut unmapped = 0;

        let mut cursor = self.tables.cursor_lower_bound_mut(&key_of(range.start()));
        while let Some(mut at) = cursor {
            let (&key, table) = at.current_mut();
            if key > last {
                break;
            }

            let (first, end) = part(key, range);
            unmapped += table.unmap(first, end);

            cursor = if table.is_empty() {
                // `remove_current()` returns the previous table if there is no next one.
                at.remove_current().0.filter(|next| *next.current().0 > key)
            } else {
                at.move_next()
            };
        }
        unmapped
    }
}

/// A table of an [`Mmu`], to map pages in it.
pub(crate) struct TableMut<'a> {
    key: usize,
    table: &'a mut Table,
}

impl TableMut<'_> {
    /// Maps the page that contains `va`. Returns whether it was unmapped before. Ignores a page of
    /// another table and returns `false`.
    fn set(&mut self, va: usize, access: Access) -> bool {
        key_of(va) == self.key && self.table.map(index_of(va), access)
    }

    /// Maps a page read-only. Returns whether it was unmapped before.
    pub(crate) fn map(&mut self, page: &ReadPage<'_>) -> bool {
        self.set(page.va(), Access::Read)
    }

    /// Maps a page for reading and writing. Returns whether it was unmapped before.
    pub(crate) fn map_writable(&mut self, page: &WritePage<'_>) -> bool {
        self.set(page.va(), Access::Write)
    }

    #[cfg(CONFIG_RUST_HMM_DEVICE)]
    fn set_exclusive(&mut self, va: usize) -> bool {
        key_of(va) == self.key && self.table.map_exclusive(index_of(va))
    }

    /// Maps a page for reading, writing and atomic operations. Returns whether it was unmapped
    /// before.
    #[cfg(CONFIG_RUST_HMM_DEVICE)]
    pub(crate) fn map_exclusive(&mut self, page: &ExclusivePage<'_>) -> bool {
        self.set_exclusive(page.va())
    }
}

#[cfg(CONFIG_DUMMY_GPU_KUNIT_TEST)]
#[kunit_tests(dummy_gpu_mmu)]
mod tests {
    use super::*;

    /// The first address of the `n`th table, some way into the address space.
    const fn table_start(n: usize) -> usize {
        (n + 3) * TABLE_SIZE
    }

    /// The address of page `page` of table `table`.
    const fn va(table: usize, page: usize) -> usize {
        table_start(table) + page * PAGE_SIZE
    }

    fn map(mmu: &mut Mmu, va: usize, access: Access) -> Result<bool> {
        let spare = SpareTable::new()?;
        Ok(mmu.table(va, spare).set(va, access))
    }

    fn pages(first: usize, count: usize) -> Result<PageRange> {
        PageRange::from_len(first, count * PAGE_SIZE)
    }

    #[test]
    fn an_empty_page_table_allows_nothing() -> Result {
        let mut mmu = Mmu::new();

        assert!(!mmu.lookup(va(0, 0), Access::Read));
        assert!(!mmu.lookup(va(0, 0), Access::Write));
        assert_eq!(mmu.unmap(pages(va(0, 0), 1)?), 0);
        Ok(())
    }

    #[test]
    fn a_page_for_reading_is_not_writable() -> Result {
        let mut mmu = Mmu::new();

        assert!(map(&mut mmu, va(0, 5), Access::Read)?);
        assert!(mmu.lookup(va(0, 5), Access::Read));
        assert!(!mmu.lookup(va(0, 5), Access::Write));
        Ok(())
    }

    #[test]
    fn a_page_for_writing_is_readable() -> Result {
        let mut mmu = Mmu::new();

        assert!(map(&mut mmu, va(0, 5), Access::Write)?);
        assert!(mmu.lookup(va(0, 5), Access::Read));
        assert!(mmu.lookup(va(0, 5), Access::Write));
        Ok(())
    }

    #[cfg(CONFIG_DUMMY_GPU_DMIRROR)]
    #[test]
    fn an_exclusive_page_is_so_until_it_is_unmapped() -> Result {
        let mut mmu = Mmu::new();
        let page = pages(va(0, 5), 1)?;
        let exclusive = |mmu: &mut Mmu| -> Result<bool> {
            let spare = SpareTable::new()?;
            Ok(mmu.table(page.start(), spare).set_exclusive(page.start()))
        };

        assert!(exclusive(&mut mmu)?);
        assert!(mmu.lookup(page.start(), Access::Write));
        assert!(mmu.any_exclusive(pages(va(0, 0), 2 * TABLE_PAGES)?));
        assert!(!mmu.any_exclusive(pages(va(0, 0), 5)?));
        assert!(!mmu.any_exclusive(pages(va(0, 6), TABLE_PAGES)?));

        for access in [Access::Read, Access::Write] {
            assert!(!map(&mut mmu, page.start(), access)?);
            assert!(mmu.any_exclusive(page));
            assert!(mmu.lookup(page.start(), Access::Write));
        }
        assert!(!exclusive(&mut mmu)?);
        assert_eq!(mmu.unmap(page), 1);
        assert!(!mmu.any_exclusive(page));
        assert!(mmu.tables.is_empty());
        Ok(())
    }

    #[cfg(CONFIG_RUST_HMM_DEVICE)]
    #[test]
    fn a_page_is_exclusive_with_all_its_bytes_and_no_others() -> Result {
        let mut mmu = Mmu::new();
        let start = va(0, 5);

        assert!(!mmu.is_exclusive(start));
        map(&mut mmu, start, Access::Write)?;
        assert!(!mmu.is_exclusive(start));
        mmu.table(start, SpareTable::new()?).set_exclusive(start);
        assert!(mmu.is_exclusive(start) && mmu.is_exclusive(start + PAGE_SIZE - 1));
        assert!(!mmu.is_exclusive(start - 1) && !mmu.is_exclusive(start + PAGE_SIZE));
        assert!(!mmu.is_exclusive(va(1, 5)));
        mmu.unmap(pages(start, 1)?);
        assert!(!mmu.is_exclusive(start));
        Ok(())
    }

    #[test]
    fn a_page_has_all_its_bytes_and_no_others() -> Result {
        let mut mmu = Mmu::new();

        map(&mut mmu, va(0, 5), Access::Write)?;
        assert!(!mmu.lookup(va(0, 5) - 1, Access::Read));
        assert!(mmu.lookup(va(0, 5) + PAGE_SIZE - 1, Access::Write));
        assert!(!mmu.lookup(va(0, 6), Access::Read));
        // The same place in the tables next to it.
        assert!(!mmu.lookup(va(1, 5), Access::Read));
        assert!(mmu.tables.get(&(key_of(va(0, 0)) - 1)).is_none());
        Ok(())
    }

    #[test]
    fn mapping_again_for_reading_takes_the_right_to_write_away() -> Result {
        let mut mmu = Mmu::new();

        assert!(map(&mut mmu, va(0, 5), Access::Write)?);
        assert!(!map(&mut mmu, va(0, 5), Access::Read)?);
        assert!(mmu.lookup(va(0, 5), Access::Read));
        assert!(!mmu.lookup(va(0, 5), Access::Write));
        Ok(())
    }

    #[test]
    fn mapping_again_for_writing_adds_the_right_to_write() -> Result {
        let mut mmu = Mmu::new();

        assert!(map(&mut mmu, va(0, 5), Access::Read)?);
        assert!(!map(&mut mmu, va(0, 5), Access::Write)?);
        assert!(mmu.lookup(va(0, 5), Access::Write));
        assert_eq!(mmu.unmap(pages(va(0, 5), 1)?), 1);
        Ok(())
    }

    #[test]
    fn a_table_takes_no_page_of_another() -> Result {
        let mut mmu = Mmu::new();
        let spare = SpareTable::new()?;

        assert!(!mmu.table(va(0, 0), spare).set(va(1, 0), Access::Read));
        assert!(!mmu.lookup(va(0, 0), Access::Read));
        assert!(!mmu.lookup(va(1, 0), Access::Read));
        Ok(())
    }

    #[test]
    fn unmap_of_part_of_a_table_keeps_the_rest() -> Result {
        let mut mmu = Mmu::new();

        for page in 0..TABLE_PAGES {
            map(&mut mmu, va(0, page), Access::Write)?;
        }
        let first = TABLE_PAGES / 8 - 1;
        let count = TABLE_PAGES / 2 + 2;
        assert_eq!(mmu.unmap(pages(va(0, first), count)?), count);
        for page in 0..TABLE_PAGES {
            let kept = page < first || page >= first + count;
            assert_eq!(mmu.lookup(va(0, page), Access::Read), kept);
            assert_eq!(mmu.lookup(va(0, page), Access::Write), kept);
        }
        Ok(())
    }

    #[test]
    fn unmap_across_tables_counts_each_page_once() -> Result {
        let mut mmu = Mmu::new();

        for table in 0..4 {
            map(&mut mmu, va(table, 0), Access::Read)?;
            map(&mut mmu, va(table, TABLE_PAGES - 1), Access::Write)?;
        }
        // From the last page of table 0 to the first page of table 3.
        let range = PageRange::new(va(0, TABLE_PAGES - 1), va(3, 1))?;
        assert_eq!(mmu.unmap(range), 6);
        assert_eq!(mmu.unmap(range), 0);
        assert!(mmu.lookup(va(0, 0), Access::Read));
        assert!(mmu.lookup(va(3, TABLE_PAGES - 1), Access::Write));
        Ok(())
    }

    #[test]
    fn unmap_frees_the_tables_that_it_empties() -> Result {
        let mut mmu = Mmu::new();

        map(&mut mmu, va(0, 0), Access::Read)?;
        map(&mut mmu, va(2, 7), Access::Read)?;
        map(&mut mmu, va(9, 0), Access::Read)?;
        assert_eq!(mmu.unmap(pages(va(2, 0), TABLE_PAGES)?), 1);
        assert!(mmu.tables.get(&key_of(va(2, 0))).is_none());
        assert_eq!(mmu.tables.keys().count(), 2);
        // The last table goes while one before the range remains.
        assert_eq!(mmu.unmap(pages(va(9, 0), 1)?), 1);
        assert!(mmu.lookup(va(0, 0), Access::Read));
        assert_eq!(mmu.unmap(PageRange::new(0, va(20, 0))?), 1);
        assert!(mmu.tables.is_empty());
        Ok(())
    }

    #[test]
    fn unmap_reaches_the_end_of_the_address_space() -> Result {
        let mut mmu = Mmu::new();
        let end = usize::MAX - PAGE_SIZE + 1;

        map(&mut mmu, end - PAGE_SIZE, Access::Write)?;
        map(&mut mmu, 0, Access::Read)?;
        assert_eq!(mmu.unmap(PageRange::new(0, end)?), 2);
        assert!(mmu.tables.is_empty());
        Ok(())
    }

    #[test]
    fn any_sequence_agrees_with_a_plain_array() -> Result {
        const TABLES: usize = 3;
        const PAGES: usize = TABLES * TABLE_PAGES;

        let mut model: KVec<Option<Access>> = KVec::from_elem(None, PAGES, GFP_KERNEL)?;
        let mut mmu = Mmu::new();
        let mut seed = 1u32;
        let mut random = |below: usize| {
            // The constants of Numerical Recipes.
            seed = seed.wrapping_mul(1664525).wrapping_add(1013904223);
            (seed >> 8) as usize % below
        };

        for _ in 0..2000 {
            let page = random(PAGES);
            match random(8) {
                0 => {
                    let count = 1 + random(PAGES - page);
                    let mut expected = 0;
                    for entry in model.iter_mut().skip(page).take(count) {
                        expected += usize::from(entry.take().is_some());
                    }
                    assert_eq!(mmu.unmap(pages(va(0, page), count)?), expected);
                }
                kind => {
                    let access = if kind % 2 == 0 {
                        Access::Read
                    } else {
                        Access::Write
                    };
                    for entry in model.iter_mut().skip(page).take(1) {
                        let new = entry.replace(access).is_none();
                        assert_eq!(map(&mut mmu, va(0, page), access)?, new);
                    }
                }
            }
        }
        for (page, entry) in model.iter().enumerate() {
            let writable = *entry == Some(Access::Write);
            assert_eq!(mmu.lookup(va(0, page), Access::Read), entry.is_some());
            assert_eq!(mmu.lookup(va(0, page), Access::Write), writable);
        }
        let mapped = model.iter().filter(|entry| entry.is_some()).count();
        assert_eq!(mmu.unmap(pages(va(0, 0), PAGES)?), mapped);
        assert!(mmu.tables.is_empty());
        Ok(())
    }
}
