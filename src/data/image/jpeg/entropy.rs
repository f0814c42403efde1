//! Huffman codes and the coefficients they stand for.

use super::{Band, ZIGZAG};

/// A Huffman code: for every 16 bits that may come, how many of them are a symbol, and which.
pub struct Huffman {
    /// By the next eight bits: length and symbol; length 0 where the symbol is longer.
    short: Vec<(u8, u8)>,
    /// By length less one: the first code past those of the length (left-aligned in 16 bits), and what to add to a
    /// code to find its symbol.
    ends: [u32; 16],
    shifts: [i32; 16],
    symbols: Vec<u8>,
}

impl Huffman {
    pub fn new(counts: &[u8], symbols: &[u8]) -> Option<Self> {
        let (mut short, mut ends, mut shifts) = (vec![(0, 0); 256], [0; 16], [0; 16]);
        let (mut code, mut index) = (0u32, 0usize);
        for length in 1..=16 {
            let count = usize::from(counts[length - 1]);
            shifts[length - 1] = index as i32 - code as i32;
            for &symbol in &symbols[index..index + count] {
                (code < 1 << length).then_some(())?;
                if length <= 8 {
                    short[(code as usize) << (8 - length)..][..1 << (8 - length)].fill((length as u8, symbol));
                }
                code += 1;
            }
            index += count;
            ends[length - 1] = code << (16 - length);
            code <<= 1;
        }
        Some(Self { short, ends, shifts, symbols: symbols.to_vec() })
    }
}

/// The bits of a scan.
pub struct BitReader<'a> {
    data: &'a [u8],
    at: usize,
    /// The next `count` bits are the lowest ones.
    bits: u64,
    count: u32,
    /// How many of them are zeros past the end.
    past: u32,
}

impl<'a> BitReader<'a> {
    pub fn new(data: &'a [u8]) -> Self {
        Self { data, at: 0, bits: 0, count: 0, past: 0 }
    }

    /// Takes in bytes up to a marker, and zeros after it.
    fn fill(&mut self) {
        while self.count <= 48 {
            let (byte, taken) = match (self.data.get(self.at), self.data.get(self.at + 1)) {
                (Some(0xFF), Some(0)) => (0xFF, 2),
                (Some(0xFF) | None, _) => (0, 0),
                (Some(&byte), _) => (byte, 1),
            };
            self.at += taken;
            self.past += if taken == 0 { 8 } else { 0 };
            self.bits = self.bits << 8 | u64::from(byte);
            self.count += 8;
        }
    }

    /// The next `count` bits, at most 16, without taking them.
    fn peek(&mut self, count: u32) -> usize {
        if self.count < count {
            self.fill();
        }
        (self.bits >> (self.count - count)) as usize & ((1 << count) - 1)
    }

    /// `None` when they lie past the end.
    fn skip(&mut self, count: u32) -> Option<()> {
        self.count -= count;
        (self.count >= self.past).then_some(())
    }

    pub fn bits(&mut self, count: u32) -> Option<i32> {
        let value = self.peek(count) as i32;
        self.skip(count)?;
        Some(value)
    }

    /// A number of `count` bits; those that begin with 0 are negative.
    fn signed(&mut self, count: u32) -> Option<i32> {
        if count == 0 {
            return Some(0);
        }
        let value = self.bits(count)?;
        Some(if value < 1 << (count - 1) { value - (1 << count) + 1 } else { value })
    }

    fn symbol(&mut self, table: &Huffman) -> Option<u8> {
        let next = self.peek(16);
        let (length, symbol) = table.short[next >> 8];
        if length > 0 {
            self.skip(length.into())?;
            return Some(symbol);
        }
        let length = table.ends.iter().position(|&end| (next as u32) < end)?;
        self.skip(length as u32 + 1)?;
        let code = (next >> (15 - length)) as i32;
        table.symbols.get(usize::try_from(code + table.shifts[length]).ok()?).copied()
    }

    pub fn dc_difference(&mut self, table: &Huffman) -> Option<i32> {
        let count = self.symbol(table)?;
        (count <= 15).then_some(())?;
        self.signed(count.into())
    }

    /// The coefficients of a band, to the bits that the scan has. `run`: how many blocks more have none.
    pub fn ac_first(&mut self, table: &Huffman, band: Band, block: &mut [i16; 64], run: &mut u32) -> Option<()> {
        if *run > 0 {
            *run -= 1;
            return Some(());
        }
        let mut k = band.from;
        while k <= band.to {
            let symbol = self.symbol(table)?;
            let (zeros, count) = (usize::from(symbol >> 4), u32::from(symbol & 15));
            match (zeros, count) {
                (15, 0) => k += 16,
                (_, 0) => {
                    *run = (1 << zeros) - 1 + self.bits(zeros as u32)? as u32;
                    break;
                }
                _ => {
                    k += zeros;
                    block[*ZIGZAG.get(k)?] = (self.signed(count)? << band.low) as i16;
                    k += 1;
                }
            }
        }
        Some(())
    }

    /// One bit more of the coefficients of a band, and those that are new.
    pub fn ac_refine(&mut self, table: &Huffman, band: Band, block: &mut [i16; 64], run: &mut u32) -> Option<()> {
        let bit = 1 << band.low;
        let mut k = band.from;
        while *run == 0 && k <= band.to {
            let symbol = self.symbol(table)?;
            let (mut zeros, count) = (usize::from(symbol >> 4), symbol & 15);
            let new = match (zeros, count) {
                (15, 0) => 0,
                (_, 0) => {
                    *run = (1 << zeros) + self.bits(zeros as u32)? as u32;
                    break;
                }
                _ if self.bits(1)? == 1 => bit,
                _ => -bit,
            };
            while k <= band.to {
                let coefficient = &mut block[ZIGZAG[k]];
                if *coefficient != 0 {
                    self.refine(coefficient, bit)?;
                } else if zeros == 0 {
                    *coefficient = new;
                    k += 1;
                    break;
                } else {
                    zeros -= 1;
                }
                k += 1;
            }
        }
        if *run > 0 {
            *run -= 1;
            for &place in &ZIGZAG[k..=band.to.max(k - 1)] {
                if block[place] != 0 {
                    self.refine(&mut block[place], bit)?;
                }
            }
        }
        Some(())
    }

    fn refine(&mut self, coefficient: &mut i16, bit: i16) -> Option<()> {
        if self.bits(1)? == 1 && *coefficient & bit == 0 {
            *coefficient = coefficient.wrapping_add(if *coefficient < 0 { -bit } else { bit });
        }
        Some(())
    }

    /// Steps over a restart marker.
    pub fn restart(&mut self) -> Option<()> {
        let at = self.end()?;
        matches!(self.data.get(at..at + 2)?, [0xFF, 0xD0..=0xD7]).then_some(())?;
        *self = Self { at: at + 2, ..Self::new(self.data) };
        Some(())
    }

    /// Where the marker after the bits is; `None` when whole bytes are left before it.
    pub fn end(&self) -> Option<usize> {
        (self.count - self.past < 8).then_some(())?;
        let mut at = self.at;
        while self.data.get(at..at + 2)? == [0xFF, 0xFF] {
            at += 1;
        }
        Some(at)
    }
}
