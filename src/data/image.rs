//! Pictures: reading any common file as 8-bit RGB, and CLIP's pre-processing of it, equal to the slow (Pillow and
//! NumPy) `CLIPImageProcessor`.

mod jpeg;

use std::{
    fmt,
    io::Cursor,
    path::{Path, PathBuf},
    sync::Arc,
};

use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, RgbImage};
use serde_json::{Value, json};

use super::resize::{Filter, Region, resize_region};
use crate::error::{Error, Result};

/// The largest picture that is decoded: Pillow's limit before it suspects an attack, 178 megapixels.
pub const MAX_PIXELS: u64 = 178_956_970;

const CLIP_MEAN: [f64; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const CLIP_STD: [f64; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];

/// Where a picture comes from.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum ImageSource {
    File(PathBuf),
    /// 8-bit RGB, row by row.
    Memory {
        name: String,
        width: u32,
        height: u32,
        rgb: Arc<[u8]>,
    },
}

impl fmt::Debug for ImageSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ImageSource({})", self.name())
    }
}

impl ImageSource {
    /// The path, or the name of a picture in memory.
    pub fn name(&self) -> String {
        match self {
            Self::File(path) => path.display().to_string(),
            Self::Memory { name, .. } => name.clone(),
        }
    }

    /// The picture as 8-bit RGB. Errors (Data) name the file.
    pub fn load(&self) -> Result<RgbImage> {
        match self {
            Self::File(path) => {
                let bytes = std::fs::read(path).map_err(|source| {
                    let missing = source.kind() == std::io::ErrorKind::NotFound;
                    let error = Error::reading(path, source);
                    if missing { error.hint("picture paths are relative to `image_folder`") } else { error }
                })?;
                decode(&bytes, &path.display().to_string())
            }
            Self::Memory { name, width, height, rgb } => RgbImage::from_raw(*width, *height, rgb.to_vec())
                .filter(|_| *width > 0 && *height > 0)
                .ok_or_else(|| Error::data(format!("{name}: {} bytes are no {width}x{height} RGB picture", rgb.len()))),
        }
    }
}

const READ: &str = "PNG, JPEG, WebP, GIF and BMP can be read, whatever the file is called";

/// Decodes a picture, its format told by its content, as Pillow's `convert("RGB")` does: palettes are looked up, alpha
/// is dropped (not blended), EXIF orientation is ignored, of an animation the first frame is taken. JPEGs are decoded
/// to the same bytes.
///
/// Of 16-bit channels the high byte is taken. (Pillow does so too, except for grey pictures, whose values it cuts off
/// at 255, which leaves them white.)
pub fn decode(bytes: &[u8], name: &str) -> Result<RgbImage> {
    let unreadable = |source: ImageError| {
        let hint = match source {
            ImageError::Unsupported(_) => READ,
            _ => "the file is damaged or cut off: fetch it again, or remove the record that names it",
        };
        Error::data(format!("cannot read the picture {name}")).caused_by(source).hint(hint)
    };
    let mut reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|source| Error::data(format!("cannot read the picture {name}")).caused_by(source))?;
    let Some(format) = reader.format() else {
        return Err(Error::data(format!("{name} is not a picture of a known format")).hint(READ));
    };
    if format == ImageFormat::Jpeg && !jpeg_is_whole(bytes) {
        return Err(
            Error::data(format!("{name}: the JPEG is cut off")).hint("fetch the file again, or remove the record")
        );
    }
    // Enough for the largest picture of four 16-bit channels, and an end to what a small file may unpack to.
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_PIXELS * 8);
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(unreadable)?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(Error::data(format!("{name} is too large: {width}x{height} pixels"))
            .hint(format!("pictures of up to {} megapixels are read: make it smaller", MAX_PIXELS / 1_000_000)));
    }
    if width == 0 || height == 0 {
        return Err(Error::data(format!("{name} has no pixels: {width}x{height}")));
    }
    // Each block takes a bit at least. What lacks would be made up, for sizes that the file only claims.
    let blocks = u64::from(width.div_ceil(8)) * u64::from(height.div_ceil(8));
    if format == ImageFormat::Jpeg && blocks / 8 > bytes.len() as u64 {
        return Err(Error::data(format!("{name}: {} bytes are no JPEG of {width}x{height} pixels", bytes.len()))
            .hint("fetch the file again, or remove the record"));
    }
    if format == ImageFormat::Jpeg
        && let Some((width, height, rgb)) = jpeg::decode(bytes)
        && let Some(picture) = RgbImage::from_raw(width, height, rgb)
    {
        return Ok(picture);
    }
    Ok(to_rgb8(DynamicImage::from_decoder(decoder).map_err(unreadable)?))
}

fn to_rgb8(picture: DynamicImage) -> RgbImage {
    let high = |values: [u16; 3]| image::Rgb(values.map(|value| (value >> 8) as u8));
    let (width, height) = (picture.width(), picture.height());
    match picture {
        DynamicImage::ImageRgb8(picture) => picture,
        DynamicImage::ImageLuma16(p) => RgbImage::from_fn(width, height, |x, y| high([p.get_pixel(x, y).0[0]; 3])),
        DynamicImage::ImageLumaA16(p) => RgbImage::from_fn(width, height, |x, y| high([p.get_pixel(x, y).0[0]; 3])),
        DynamicImage::ImageRgb16(p) => RgbImage::from_fn(width, height, |x, y| high(p.get_pixel(x, y).0)),
        DynamicImage::ImageRgba16(p) => RgbImage::from_fn(width, height, |x, y| {
            let [r, g, b, _] = p.get_pixel(x, y).0;
            high([r, g, b])
        }),
        other => other.into_rgb8(),
    }
}

/// Whether an end marker follows the first scan. The decoder fills what is missing with grey, which nobody would see.
fn jpeg_is_whole(bytes: &[u8]) -> bool {
    let mut at = 2;
    while let Some(&[marker, kind, high, low]) = bytes.get(at..at + 4) {
        if marker != 0xFF {
            return false;
        }
        match kind {
            0xFF => at += 1,
            // Markers without a length.
            0x01 | 0xD0..=0xD8 => at += 2,
            0xDA => return bytes[at..].windows(2).any(|pair| pair == [0xFF, 0xD9]),
            _ => at += 2 + usize::from(u16::from_be_bytes([high, low])),
        }
    }
    false
}

/// Pixel values: f32 `[3, height, width]`, channel by channel, row by row.
#[derive(Clone, Debug, PartialEq)]
pub struct PixelValues {
    pub height: u32,
    pub width: u32,
    pub data: Vec<f32>,
}

/// To which size the picture is brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Size {
    ShortestEdge(u32),
    Exact { height: u32, width: u32 },
}

/// CLIP's image processor, as a `preprocessor_config.json` describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageProcessor {
    resize: Option<Size>,
    filter: Filter,
    /// Height and width.
    crop: Option<(u32, u32)>,
    /// Mode `pad`: the picture is squared with the mean colour first.
    pub pad_to_square: bool,
    rescale: Option<f64>,
    mean: [f64; 3],
    std: [f64; 3],
    normalize: bool,
}

impl ImageProcessor {
    /// CLIP's defaults for pictures of `size` x `size`: shortest edge, centre crop, bicubic.
    pub fn clip(size: u32) -> Self {
        Self {
            resize: Some(Size::ShortestEdge(size)),
            filter: Filter::Bicubic,
            crop: Some((size, size)),
            pad_to_square: false,
            rescale: Some(1.0 / 255.0),
            mean: CLIP_MEAN,
            std: CLIP_STD,
            normalize: true,
        }
    }

    /// Reads `preprocessor_config.json`, or the `image_processor` part of `processor_config.json`, of a model folder;
    /// a folder with neither has CLIP's defaults for `size`, the vision tower's.
    pub fn from_folder(folder: &Path, size: u32) -> Result<Self> {
        for name in ["preprocessor_config.json", "processor_config.json"] {
            let path = folder.join(name);
            let bytes = match std::fs::read(&path) {
                Ok(bytes) => bytes,
                Err(source) if source.kind() == std::io::ErrorKind::NotFound => continue,
                Err(source) => return Err(Error::reading(&path, source)),
            };
            let file = path.display().to_string();
            let mut config: Value = serde_json::from_slice(&bytes)
                .map_err(|source| Error::data(format!("{file} is not valid JSON")).caused_by(source))?;
            if name == "processor_config.json" {
                match config.get_mut("image_processor").map(Value::take) {
                    Some(part) => config = part,
                    None => continue,
                }
            }
            return Self::from_config(&config, &file, size);
        }
        Ok(Self::clip(size))
    }

    /// From the JSON of a `preprocessor_config.json`; what it leaves out is as CLIP has it, `size` the tower's.
    /// `file` is the name that errors give.
    pub fn from_config(config: &Value, file: &str, size: u32) -> Result<Self> {
        let config = Config { json: config, file };
        let mut processor = Self::clip(size);
        processor.resize = match config.get("size") {
            None => processor.resize,
            Some(value) => Some(config.size(value, "size", Size::ShortestEdge)?),
        };
        if !config.flag("do_resize", true)? {
            processor.resize = None;
        }
        processor.crop = match config.get("crop_size") {
            _ if !config.flag("do_center_crop", true)? => None,
            None => processor.crop,
            Some(value) => match config.size(value, "crop_size", |side| Size::Exact { height: side, width: side })? {
                Size::Exact { height, width } => Some((height, width)),
                Size::ShortestEdge(side) => Some((side, side)),
            },
        };
        if let Some(value) = config.get("resample") {
            processor.filter = value
                .as_u64()
                .and_then(Filter::from_number)
                .ok_or_else(|| config.error("resample", "is not one of Pillow's filters, 0 to 5"))?;
        }
        if let Some(value) = config.get("rescale_factor") {
            processor.rescale = Some(value.as_f64().ok_or_else(|| config.error("rescale_factor", "is not a number"))?);
        }
        if !config.flag("do_rescale", true)? {
            processor.rescale = None;
        }
        processor.normalize = config.flag("do_normalize", true)?;
        processor.pad_to_square = config.flag("do_pad", false)?;
        if let Some(value) = config.get("image_mean") {
            processor.mean = config.channels(value, "image_mean")?;
        }
        if let Some(value) = config.get("image_std") {
            processor.std = config.channels(value, "image_std")?;
            if processor.std.contains(&0.0) {
                return Err(config.error("image_std", "holds a zero"));
            }
        }
        Ok(processor)
    }

    /// The same processing to pictures of `size` x `size`.
    pub fn with_size(mut self, size: u32) -> Self {
        self.resize = match self.resize {
            Some(Size::Exact { .. }) => Some(Size::Exact { height: size, width: size }),
            _ => Some(Size::ShortestEdge(size)),
        };
        self.crop = self.crop.map(|_| (size, size));
        self
    }

    /// Mean and deviation of each channel, of values in 0 to 1.
    pub fn mean_and_std(&self) -> [[f64; 3]; 2] {
        [self.mean, self.std]
    }

    /// Mode `pad` (true) or `square` (false) of `image_aspect_ratio`.
    pub fn with_pad(mut self, pad: bool) -> Self {
        self.pad_to_square = pad;
        self
    }

    /// The `preprocessor_config.json` that says the same.
    pub fn to_config(&self) -> Value {
        let exact = |(height, width): (u32, u32)| json!({"height": height, "width": width});
        let mut config = json!({
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": true,
            "do_resize": self.resize.is_some(),
            "resample": self.filter as u64,
            "do_center_crop": self.crop.is_some(),
            "do_rescale": self.rescale.is_some(),
            "rescale_factor": self.rescale.unwrap_or(1.0 / 255.0),
            "do_normalize": self.normalize,
            "image_mean": self.mean,
            "image_std": self.std,
        });
        match self.resize {
            Some(Size::ShortestEdge(side)) => config["size"] = json!({"shortest_edge": side}),
            Some(Size::Exact { height, width }) => config["size"] = exact((height, width)),
            None => {}
        }
        if let Some(crop) = self.crop {
            config["crop_size"] = exact(crop);
        }
        config
    }

    /// The colour that mode `pad` fills with: floor(mean * 255).
    pub fn fill_colour(&self) -> [u8; 3] {
        self.mean.map(|mean| (mean * 255.0) as u8)
    }

    /// Height and width of the result, where the config fixes them whatever the picture.
    pub fn output_size(&self) -> Option<(u32, u32)> {
        self.crop.or(match self.resize {
            Some(Size::Exact { height, width }) => Some((height, width)),
            Some(Size::ShortestEdge(side)) if self.pad_to_square => Some((side, side)),
            _ => None,
        })
    }

    /// Brings a picture to pixel values. Error (Data): the picture is too elongated to be squared or resized.
    pub fn process(&self, picture: &RgbImage) -> Result<PixelValues> {
        Ok(self.normalized(&self.cropped(picture)?))
    }

    /// The first half, still 8-bit: squared (mode `pad`), resized and cropped.
    pub fn cropped(&self, picture: &RgbImage) -> Result<RgbImage> {
        if picture.width() == 0 || picture.height() == 0 {
            return Err(Error::data("a picture without pixels"));
        }
        let squared;
        let picture = if self.pad_to_square && picture.width() != picture.height() {
            squared = self.squared(picture)?;
            &squared
        } else {
            picture
        };
        let (width, height) = self.resized(picture.width(), picture.height());
        let (crop_height, crop_width) = self.crop.unwrap_or((height, width));
        if u64::from(crop_height) * u64::from(crop_width) > MAX_PIXELS {
            return Err(elongated(picture));
        }
        // Where the crop is larger than the picture, black is put round it, the odd pixel in front.
        let (left, right, pad_x) = crop_range(width, crop_width);
        let (top, bottom, pad_y) = crop_range(height, crop_height);
        let region = Region { x: left, y: top, width: right - left, height: bottom - top };
        let part = resize_region(picture, width, height, self.filter, region);
        if (part.width(), part.height()) == (crop_width, crop_height) {
            return Ok(part);
        }
        let mut canvas = RgbImage::new(crop_width, crop_height);
        image::imageops::replace(&mut canvas, &part, i64::from(pad_x), i64::from(pad_y));
        Ok(canvas)
    }

    fn squared(&self, picture: &RgbImage) -> Result<RgbImage> {
        let (width, height) = picture.dimensions();
        let side = width.max(height);
        if u64::from(side) * u64::from(side) > MAX_PIXELS {
            return Err(elongated(picture));
        }
        let mut canvas = RgbImage::from_pixel(side, side, image::Rgb(self.fill_colour()));
        image::imageops::replace(&mut canvas, picture, i64::from((side - width) / 2), i64::from((side - height) / 2));
        Ok(canvas)
    }

    /// Width and height after resizing; the long side is cut to a whole pixel.
    fn resized(&self, width: u32, height: u32) -> (u32, u32) {
        match self.resize {
            None => (width, height),
            Some(Size::Exact { height, width }) => (width, height),
            Some(Size::ShortestEdge(side)) => {
                let long = |long: u32, short: u32| {
                    u32::try_from(u64::from(side) * u64::from(long) / u64::from(short)).unwrap_or(u32::MAX)
                };
                if width <= height { (side, long(height, width)) } else { (long(width, height), side) }
            }
        }
    }

    /// The second half: 8-bit to f32, in the order and the widths of NumPy's arithmetic (scaled in f64, rounded, then
    /// f32).
    fn normalized(&self, picture: &RgbImage) -> PixelValues {
        let (width, height) = picture.dimensions();
        let table: [[f32; 256]; 3] = std::array::from_fn(|channel| {
            std::array::from_fn(|value| {
                let value = self.rescale.map_or(value as f32, |factor| (value as f64 * factor) as f32);
                if !self.normalize {
                    return value;
                }
                (value - self.mean[channel] as f32) / self.std[channel] as f32
            })
        });
        let mut data = Vec::with_capacity(picture.as_raw().len());
        for (channel, table) in table.iter().enumerate() {
            data.extend(picture.as_raw().iter().skip(channel).step_by(3).map(|&value| table[usize::from(value)]));
        }
        PixelValues { height, width, data }
    }
}

fn elongated(picture: &RgbImage) -> Error {
    let (width, height) = picture.dimensions();
    Error::data(format!("a picture of {width}x{height} is too large once it is squared or resized"))
        .hint("make the picture smaller; `image_aspect_ratio = \"square\"` takes elongated pictures")
}

/// A centred crop of `crop` out of `side`: from, to, and where the result begins in a canvas of `crop`.
fn crop_range(side: u32, crop: u32) -> (u32, u32, u32) {
    if crop <= side {
        let from = (side - crop) / 2;
        return (from, from + crop, 0);
    }
    // The slow processor pads with ceil((crop - side) / 2) and then cuts out the window that begins at
    // floor((side - crop) / 2) + that padding, which is 0.
    (0, side, (crop - side).div_ceil(2))
}

/// A config with the name of its file.
struct Config<'a> {
    json: &'a Value,
    file: &'a str,
}

impl Config<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    fn error(&self, key: &str, what: &str) -> Error {
        Error::data(format!("{}: `{key}` {what}", self.file))
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        self.get(key)
            .map_or(Ok(default), |value| value.as_bool().ok_or_else(|| self.error(key, "is not true or false")))
    }

    /// A number (meant as `bare` says), `{"shortest_edge": n}` or `{"height": n, "width": n}`.
    fn size(&self, value: &Value, key: &str, bare: fn(u32) -> Size) -> Result<Size> {
        let side = |value: Option<&Value>| {
            let side = value.and_then(Value::as_u64).filter(|side| (1..=16_384).contains(side));
            side.map(|side| side as u32)
        };
        let size = if let Some(side) = side(Some(value)) {
            Some(bare(side))
        } else if let Some(edge) = side(value.get("shortest_edge")) {
            Some(Size::ShortestEdge(edge))
        } else {
            let sides = side(value.get("height")).zip(side(value.get("width")));
            sides.map(|(height, width)| Size::Exact { height, width })
        };
        size.ok_or_else(|| {
            self.error(key, "is no size").hint(
                "a size is a number, {\"shortest_edge\": n} or {\"height\": n, \"width\": n}, with sides of 1 to 16384",
            )
        })
    }

    fn channels(&self, value: &Value, key: &str) -> Result<[f64; 3]> {
        let numbers: Option<Vec<f64>> = value.as_array().and_then(|values| values.iter().map(Value::as_f64).collect());
        numbers.and_then(|numbers| numbers.try_into().ok()).ok_or_else(|| self.error(key, "is not three numbers"))
    }
}
