//! Gradients meet in the host's memory: each bucket is added up in the order of the devices once all have sent it, and
//! goes back to all of them. The order is fixed, so that the same devices give the same bytes.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use rayon::prelude::*;

use super::buckets::Bucket;

/// Elements that one core adds up at once; also what a square sum's order follows from.
const CHUNK: usize = 1 << 16;

/// What a device sends.
pub enum Sent {
    /// A bucket's gradients; none from a device that had nothing to compute.
    Part { device: usize, bucket: usize, values: Vec<f32> },
    /// It ends before its time.
    Gone,
}

/// What a device gets.
#[derive(Clone)]
pub enum Got {
    /// The sum of a bucket, in its order of spans.
    Sum { bucket: usize, values: Arc<Vec<f32>> },
    /// The square sum of all gradients, the last thing in a step.
    SquareSum(f64),
}

/// A link between devices and host that is slower than the machine's: for tests of what hides behind the backward.
#[derive(Clone, Copy, Debug)]
pub struct SlowLink {
    /// Each way.
    pub bytes_per_second: f64,
}

/// Adds up a step's gradients. Buckets go back in their order; `between` adds what other hosts have of each.
///
/// None where a device ended before its time: then nobody gets anything more.
///
/// # Errors
/// Those of `between`.
pub fn add_up<E>(
    buckets: &[Bucket],
    arriving: &Receiver<Sent>,
    leaving: &[Sender<Got>],
    slow: Option<SlowLink>,
    mut between: impl FnMut(&mut [f32]) -> Result<(), E>,
) -> Result<Option<f64>, E> {
    let mut parts: Vec<Parts> = buckets.iter().map(|_| Parts::default()).collect();
    let (mut square_sum, mut link_is_free) = (0.0, Instant::now());
    for (index, bucket) in buckets.iter().enumerate() {
        while parts[index].0.len() < leaving.len() {
            match arriving.recv() {
                Ok(Sent::Part { device, bucket, values }) => parts[bucket].0.push((device, values)),
                Ok(Sent::Gone) | Err(_) => return Ok(None),
            }
        }
        let mut sum = std::mem::take(&mut parts[index]).sum(bucket.elements());
        between(&mut sum)?;
        square_sum += square(&sum);
        if let Some(SlowLink { bytes_per_second }) = slow {
            // Down and up again.
            let seconds = (2 * 4 * sum.len()) as f64 / bytes_per_second;
            link_is_free = link_is_free.max(Instant::now()) + Duration::from_secs_f64(seconds);
            thread::sleep(link_is_free - Instant::now());
        }
        let values = Arc::new(sum);
        for to in leaving {
            // One that is gone says so itself.
            let _ = to.send(Got::Sum { bucket: index, values: values.clone() });
        }
    }
    for to in leaving {
        let _ = to.send(Got::SquareSum(square_sum));
    }
    Ok(Some(square_sum))
}

/// A bucket of several devices.
#[derive(Default)]
struct Parts(Vec<(usize, Vec<f32>)>);

impl Parts {
    fn sum(mut self, elements: usize) -> Vec<f32> {
        self.0.sort_by_key(|(device, _)| *device);
        let mut parts = self.0.into_iter().map(|(_, values)| values).filter(|values| !values.is_empty());
        let mut sum = parts.next().unwrap_or_else(|| vec![0.0; elements]);
        for part in parts {
            sum.par_chunks_mut(CHUNK).zip(part.par_chunks(CHUNK)).for_each(|(sum, part)| {
                sum.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
            });
        }
        sum
    }
}

fn square(values: &[f32]) -> f64 {
    let chunk = |values: &[f32]| values.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>();
    let sums: Vec<f64> = values.par_chunks(CHUNK).map(chunk).collect();
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, sync::mpsc};

    use super::*;
    use crate::train::optimizer::Span;

    fn bucket(count: usize) -> Bucket {
        Bucket { milestone: None, spans: vec![Span { shard: 0, first: 0, count }] }
    }

    #[test]
    fn sums_follow_the_order_of_devices_whatever_comes_first() {
        // 1e8 + 1 - 1e8 is 0 in one order and 1 in another.
        let given = [vec![1e8, 1.0], vec![1.0, 2.0], vec![-1e8, 3.0]];
        for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
            let (send, arriving) = mpsc::channel();
            for device in order {
                send.send(Sent::Part { device, bucket: 1, values: Vec::new() }).unwrap();
                send.send(Sent::Part { device, bucket: 0, values: given[device].clone() }).unwrap();
            }
            let (leaving, got): (Vec<_>, Vec<_>) = (0..3).map(|_| mpsc::channel()).unzip();
            let buckets = [bucket(2), bucket(1)];
            let total = add_up(&buckets, &arriving, &leaving, None, |_| Ok::<_, Infallible>(())).unwrap();
            assert_eq!(total, Some(36.0));
            for got in got {
                let Got::Sum { bucket: 0, values } = got.recv().unwrap() else { panic!("the first sum") };
                assert_eq!(*values, [0.0, 6.0]);
                let Got::Sum { bucket: 1, values } = got.recv().unwrap() else { panic!("the second sum") };
                assert_eq!(*values, [0.0]);
                assert!(matches!(got.recv().unwrap(), Got::SquareSum(36.0)));
            }
        }
    }

    #[test]
    fn a_device_that_is_gone_ends_it_for_all() {
        let (send, arriving) = mpsc::channel();
        let (leaving, got) = mpsc::channel();
        send.send(Sent::Part { device: 0, bucket: 0, values: vec![1.0] }).unwrap();
        send.send(Sent::Gone).unwrap();
        let leaving = [leaving.clone(), leaving];
        assert_eq!(add_up(&[bucket(1)], &arriving, &leaving, None, |_| Ok::<_, Infallible>(())), Ok(None));
        drop(leaving);
        assert!(got.recv().is_err());
    }
}
