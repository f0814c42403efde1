//! JPEG as libjpeg-turbo decodes it, and so Pillow: byte for byte.
//!
//! A decoder may round as it likes, and each does: the inverse cosine transform, the chroma between two samples and the
//! colours differ by a few of 255, which the features of a vision tower show. Here are the integer transform (`islow`),
//! the triangle filter ("fancy upsampling") and the 16-bit colour tables that libjpeg-turbo has by default.
//!
//! Here are the markers and the order of blocks; `entropy` reads coefficients, `samples` makes pixels of them.

mod entropy;
mod samples;

use super::MAX_PIXELS;
use entropy::{BitReader, Huffman};
use samples::{cmyk_to_rgb, ycc_to_rgb};

/// Scans that a picture is read from. A progressive one has about ten; each goes over all blocks, however few bytes it
/// has.
const MAX_SCANS: usize = 100;

/// Width, height and 8-bit RGB of a JPEG of one, three or four Huffman-coded components, sequential or progressive.
///
/// `None` for what is rarer (arithmetic coding, 12 bits, scans that are missing) and for damaged files: another decoder
/// may know better, or say what is wrong.
pub fn decode(bytes: &[u8]) -> Option<(u32, u32, Vec<u8>)> {
    let mut decoder = Decoder::default();
    decoder.read(bytes)?;
    let rgb = decoder.rgb()?;
    Some((decoder.width as u32, decoder.height as u32, rgb))
}

/// Where the k-th coefficient of a block in zigzag order belongs.
const ZIGZAG: [usize; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21,
    28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54,
    47, 55, 62, 63,
];

#[derive(Default)]
struct Decoder {
    width: usize,
    height: usize,
    progressive: bool,
    components: Vec<Component>,
    /// Zigzag order.
    quantisation: [Option<[u16; 64]>; 4],
    dc_tables: [Option<Huffman>; 4],
    ac_tables: [Option<Huffman>; 4],
    restart_interval: usize,
    jfif: bool,
    /// The transform that an Adobe marker names.
    adobe: Option<u8>,
}

#[derive(Default)]
struct Component {
    id: u8,
    /// Sampling factors.
    h: usize,
    v: usize,
    table: usize,
    quantisation: Option<[u16; 64]>,
    /// Size in samples, without what fills up the last blocks.
    width: usize,
    height: usize,
    /// Blocks in a row, with those that fill up the last unit.
    blocks_wide: usize,
    blocks_high: usize,
    /// [blocks_high * 8, blocks_wide * 8]
    samples: Vec<u8>,
    /// Coefficients block by block, while a progressive picture is read.
    coefficients: Vec<[i16; 64]>,
    /// How many low bits each coefficient still lacks; 16 before its first scan.
    missing_bits: Vec<u8>,
    dc_table: usize,
    ac_table: usize,
    last_dc: i32,
}

impl Component {
    fn stride(&self) -> usize {
        self.blocks_wide * 8
    }

    fn row(&self, y: usize) -> &[u8] {
        &self.samples[y * self.stride()..][..self.width]
    }
}

/// Which coefficients a scan brings, and which of their bits.
#[derive(Clone, Copy)]
struct Band {
    from: usize,
    to: usize,
    high: u32,
    low: u32,
}

impl Decoder {
    fn read(&mut self, bytes: &[u8]) -> Option<()> {
        let mut at = 2;
        let mut scans = 0;
        loop {
            while *bytes.get(at)? == 0xFF && *bytes.get(at + 1)? == 0xFF {
                at += 1;
            }
            let (0xFF, kind) = (*bytes.get(at)?, *bytes.get(at + 1)?) else { return None };
            at += 2;
            match kind {
                0xD9 => break,
                0x01 | 0xD0..=0xD8 => continue,
                _ => {}
            }
            let length = usize::from(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
            let segment = bytes.get(at + 2..at + length)?;
            at += length;
            match kind {
                0xC0..=0xC2 => self.frame(segment, kind == 0xC2, bytes.len())?,
                0xC4 => self.huffman_tables(segment)?,
                // Lossless, hierarchical and arithmetic coding.
                0xC3 | 0xC5..=0xCF => return None,
                0xDB => self.quantisation_tables(segment)?,
                0xDC => return None,
                0xDD => self.restart_interval = usize::from(u16::from_be_bytes([*segment.first()?, *segment.get(1)?])),
                0xDA => {
                    at += self.scan(segment, bytes.get(at..)?)?;
                    scans += 1;
                    (scans <= MAX_SCANS).then_some(())?;
                }
                0xE0 => self.jfif |= segment.starts_with(b"JFIF\0"),
                0xEE if segment.starts_with(b"Adobe") && segment.len() >= 12 => self.adobe = Some(segment[11]),
                _ => {}
            }
        }
        (scans > 0).then_some(())?;
        for component in &mut self.components {
            // libjpeg smooths blocks that lack low coefficients.
            component.missing_bits.iter().take(10).all(|&bits| bits == 0).then_some(())?;
            for (block, coefficients) in std::mem::take(&mut component.coefficients).iter().enumerate() {
                component.transform(block, coefficients)?;
            }
        }
        Some(())
    }

    /// `file_bytes`: a picture of more blocks than the whole file has bits is refused before anything is made for it.
    fn frame(&mut self, segment: &[u8], progressive: bool, file_bytes: usize) -> Option<()> {
        let [8, h0, h1, w0, w1, count, list @ ..] = segment else { return None };
        self.height = usize::from(u16::from_be_bytes([*h0, *h1]));
        self.width = usize::from(u16::from_be_bytes([*w0, *w1]));
        self.progressive = progressive;
        let whole = list.len() == usize::from(*count) * 3 && self.width > 0 && self.height > 0;
        let within = matches!(count, 1 | 3 | 4) && (self.width * self.height) as u64 <= MAX_PIXELS;
        (whole && within && self.components.is_empty()).then_some(())?;
        for part in list.chunks_exact(3) {
            let (h, v) = (usize::from(part[1] >> 4), usize::from(part[1] & 15));
            ((1..=4).contains(&h) && (1..=4).contains(&v) && part[2] < 4).then_some(())?;
            self.components.push(Component { id: part[0], h, v, table: part[2].into(), ..Component::default() });
        }
        let (h_most, v_most) = self.sampling()?;
        let units = (self.width.div_ceil(8 * h_most), self.height.div_ceil(8 * v_most));
        let blocks = |component: &Component| units.0 * component.h * units.1 * component.v;
        (self.components.iter().map(blocks).sum::<usize>() / 8 <= file_bytes).then_some(())?;
        for component in &mut self.components {
            component.width = (self.width * component.h).div_ceil(h_most);
            component.height = (self.height * component.v).div_ceil(v_most);
            (component.blocks_wide, component.blocks_high) = (units.0 * component.h, units.1 * component.v);
            let blocks = component.blocks_wide * component.blocks_high;
            component.samples = vec![0; blocks * 64];
            if progressive {
                component.coefficients = vec![[0; 64]; blocks];
            }
            component.missing_bits = vec![16; 64];
        }
        Some(())
    }

    /// The largest sampling factors.
    fn sampling(&self) -> Option<(usize, usize)> {
        let h = self.components.iter().map(|component| component.h).max()?;
        Some((h, self.components.iter().map(|component| component.v).max()?))
    }

    fn quantisation_tables(&mut self, mut segment: &[u8]) -> Option<()> {
        while let [head, rest @ ..] = segment {
            let wide = head >> 4 != 0;
            let (values, rest) = rest.split_at_checked(if wide { 128 } else { 64 })?;
            let table = std::array::from_fn(|k| {
                if wide { u16::from_be_bytes([values[2 * k], values[2 * k + 1]]) } else { values[k].into() }
            });
            *self.quantisation.get_mut(usize::from(head & 15))? = Some(table);
            segment = rest;
        }
        Some(())
    }

    fn huffman_tables(&mut self, mut segment: &[u8]) -> Option<()> {
        while let [head, rest @ ..] = segment {
            let (counts, rest) = rest.split_at_checked(16)?;
            let (symbols, rest) = rest.split_at_checked(counts.iter().map(|&count| usize::from(count)).sum())?;
            let tables = if head >> 4 == 0 { &mut self.dc_tables } else { &mut self.ac_tables };
            *tables.get_mut(usize::from(head & 15))? = Some(Huffman::new(counts, symbols)?);
            segment = rest;
        }
        Some(())
    }

    /// Reads a scan's coefficients out of `data`; returns how many bytes they took.
    fn scan(&mut self, header: &[u8], data: &[u8]) -> Option<usize> {
        let [count, rest @ ..] = header else { return None };
        let (list, &[from, to, bits]) = rest.split_at_checked(usize::from(*count) * 2)? else { return None };
        let band = Band { from: from.into(), to: to.into(), high: (bits >> 4).into(), low: (bits & 15).into() };
        let band = if self.progressive { band } else { Band { from: 0, to: 63, high: 0, low: 0 } };
        let dc_alone = band.from == 0 && band.to == 0;
        let ac_alone = (1..=band.to).contains(&band.from) && *count == 1;
        ((!self.progressive || dc_alone || ac_alone) && band.to < 64 && band.low < 14).then_some(())?;
        let mut members = Vec::new();
        for part in list.chunks_exact(2) {
            let index = self.components.iter().position(|component| component.id == part[0])?;
            let component = &mut self.components[index];
            (component.dc_table, component.ac_table) = ((part[1] >> 4).into(), (part[1] & 15).into());
            (component.dc_table < 4 && component.ac_table < 4 && !members.contains(&index)).then_some(())?;
            if component.quantisation.is_none() {
                component.quantisation = self.quantisation[component.table];
            }
            component.missing_bits[band.from..=band.to].fill(band.low as u8);
            members.push(index);
        }
        (!members.is_empty()).then_some(())?;
        let (h_most, v_most) = self.sampling()?;
        // One component alone comes block by block, without those that fill up the last unit.
        let alone = members.len() == 1;
        let (wide, high) = if alone {
            let component = &self.components[members[0]];
            (component.width.div_ceil(8), component.height.div_ceil(8))
        } else {
            (self.width.div_ceil(8 * h_most), self.height.div_ceil(8 * v_most))
        };
        let mut reader = BitReader::new(data);
        let mut end_of_band_run = 0;
        for unit in 0..wide * high {
            if self.restart_interval > 0 && unit > 0 && unit.is_multiple_of(self.restart_interval) {
                reader.restart()?;
                end_of_band_run = 0;
                self.components.iter_mut().for_each(|component| component.last_dc = 0);
            }
            let (x, y) = (unit % wide, unit / wide);
            for &member in &members {
                let component = &self.components[member];
                let (h, v) = if alone { (1, 1) } else { (component.h, component.v) };
                for part in 0..h * v {
                    let (column, row) = (x * h + part % h, y * v + part / h);
                    self.block(&mut reader, member, row, column, band, &mut end_of_band_run)?;
                }
            }
        }
        self.components.iter_mut().for_each(|component| component.last_dc = 0);
        reader.end()
    }

    fn block(
        &mut self,
        reader: &mut BitReader<'_>,
        member: usize,
        row: usize,
        column: usize,
        band: Band,
        end_of_band_run: &mut u32,
    ) -> Option<()> {
        let component = &mut self.components[member];
        let index = row * component.blocks_wide + column;
        let dc_table = self.dc_tables[component.dc_table].as_ref();
        let ac_table = self.ac_tables[component.ac_table].as_ref();
        if !self.progressive {
            let mut block = [0; 64];
            component.last_dc = component.last_dc.wrapping_add(reader.dc_difference(dc_table?)?);
            block[0] = component.last_dc as i16;
            reader.ac_first(ac_table?, Band { from: 1, ..band }, &mut block, &mut 0)?;
            return component.transform(index, &block);
        }
        let block = component.coefficients.get_mut(index)?;
        match (band.from, band.high) {
            (0, 0) => {
                component.last_dc = component.last_dc.wrapping_add(reader.dc_difference(dc_table?)?);
                block[0] = (component.last_dc << band.low) as i16;
            }
            (0, _) => block[0] |= (reader.bits(1)? << band.low) as i16,
            (_, 0) => reader.ac_first(ac_table?, band, block, end_of_band_run)?,
            _ => reader.ac_refine(ac_table?, band, block, end_of_band_run)?,
        }
        Some(())
    }

    /// The picture's colours, as Pillow's `convert("RGB")` has them.
    fn rgb(&self) -> Option<Vec<u8>> {
        let (h_most, v_most) = self.sampling()?;
        let ids: Vec<u8> = self.components.iter().map(|component| component.id).collect();
        let in_ycc = match ids.len() {
            1 => false,
            3 => self.jfif || self.adobe.map_or(ids != *b"RGB", |transform| transform != 0),
            4 => self.adobe.is_some_and(|transform| transform != 0),
            _ => return None,
        };
        let mut rows = vec![vec![0; self.width + 2 * h_most]; self.components.len()];
        let mut rgb = Vec::with_capacity(self.width * self.height * 3);
        for y in 0..self.height {
            for (component, row) in self.components.iter().zip(&mut rows) {
                component.upsampled(y, h_most, v_most, row)?;
            }
            for x in 0..self.width {
                let [a, b, c] = std::array::from_fn(|channel| rows.get(channel).map_or(0, |row| row[x]));
                let colour = if in_ycc { ycc_to_rgb(a, b, c) } else { [a, b, c] };
                match rows.get(3) {
                    // What libjpeg hands over is CMY of the opposite of RGB, and Pillow inverts all four.
                    Some(black) if in_ycc => rgb.extend(cmyk_to_rgb(colour, 255 - black[x])),
                    Some(black) => rgb.extend(cmyk_to_rgb(colour.map(|value| 255 - value), 255 - black[x])),
                    None if rows.len() == 1 => rgb.extend([a; 3]),
                    None => rgb.extend(colour),
                }
            }
        }
        Some(rgb)
    }
}
