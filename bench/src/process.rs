//! What the kernel says of this process.

use anyhow::{Context, Result};

/// Resident memory of this process. What the allocator keeps of freed memory counts: it is memory all the same.
pub fn resident_bytes() -> Result<usize> {
    let statm = std::fs::read_to_string("/proc/self/statm").context("/proc/self/statm")?;
    let pages = statm
        .split(' ')
        .nth(1)
        .context("/proc/self/statm has no second field")?;
    Ok(pages.parse::<usize>().context("/proc/self/statm")? * page_bytes()?)
}

fn page_bytes() -> Result<usize> {
    let auxv = std::fs::read("/proc/self/auxv").context("/proc/self/auxv")?;
    let word = |bytes: &[u8]| bytes.try_into().map(usize::from_ne_bytes).unwrap_or(0);
    const AT_PAGESZ: usize = 6;
    auxv.chunks_exact(2 * size_of::<usize>())
        .map(|entry| entry.split_at(size_of::<usize>()))
        .find(|(key, _)| word(key) == AT_PAGESZ)
        .map(|(_, value)| word(value))
        .context("the kernel does not say how large a page is")
}
