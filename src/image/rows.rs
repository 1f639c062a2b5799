//! An image at a network's size, one row at a time.

use super::area::{self, Area};
use super::RgbImage;
use crate::error::Result;
use std::borrow::Cow;

/// An image at a network's size and normalised, row by row: resizing and normalisation are done by the threads of the network, each for the rows
/// that it reads, and while they are near.
#[derive(Debug)]
pub struct Rows<'a> {
    image: Cow<'a, RgbImage>,
    /// `None`: the image has the size.
    area: Option<Area>,
    size: (usize, usize),
    scale: [f32; 3],
    shift: [f32; 3],
}

/// What rows are made in, kept from one to the next, and from image to image.
#[derive(Debug, Default)]
pub struct RowScratch {
    area: area::Scratch,
    pixels: Vec<u8>,
}

impl<'a> Rows<'a> {
    pub(super) fn new(image: &'a RgbImage, size: (u32, u32), scale: [f32; 3], shift: [f32; 3]) -> Result<Self> {
        let sides = |(w, h): (u32, u32)| (w as usize, h as usize);
        let (from, to) = ((image.width, image.height), sides(size));
        let area = if from == size { None } else { Area::new(sides(from), to) };
        let image = if from == size || area.is_some() { Cow::Borrowed(image) } else { Cow::Owned(image.resize_area(size.0, size.1)?) };
        Ok(Self { image, area, size: to, scale, shift })
    }

    /// Columns and rows.
    pub fn size(&self) -> (usize, usize) {
        self.size
    }

    /// Row `y` as three rows of f32, red first, one after the other. Panics: there is no such row, or `out` has no room for it.
    pub fn row(&self, y: usize, scratch: &mut RowScratch, out: &mut [f32]) {
        let row = 3 * self.size.0;
        let pixels = match &self.area {
            None => &self.image.data()[y * row..][..row],
            Some(area) => {
                scratch.pixels.resize(row, 0);
                area.row(self.image.data(), y, &mut scratch.area, &mut scratch.pixels);
                &scratch.pixels[..]
            }
        };
        area::planes(pixels, self.scale, self.shift, &mut out[..row]);
    }
}
