//! The test images of an evaluation, readable and broken.

use super::images::StageImages;
use crate::data::check::broken_among;
use crate::data::{Broken, Subset};
use crate::distributed::Comm;
use crate::error::{Error, Result};
use crate::recipe::TestImages;

/// The test images of an evaluation: the readable subset, and the broken images.
#[derive(Debug)]
pub(crate) struct TestSet {
    pub(super) subset: Subset,
    pub(super) broken: Vec<Broken>,
}

impl TestSet {
    /// Chooses the requested test images of a stage, and reads each once to find broken ones. Collective.
    ///
    /// Errors: those of stores.
    pub(super) fn choose(
        images: &StageImages,
        requested: &TestImages,
        comm: &Comm,
    ) -> Result<Self> {
        let dataset = &images.test;
        let subset = images.subset(requested)?;
        let own = broken_among(dataset, &subset.places()[comm.local_range(subset.len())]);
        let broken: Vec<Broken> = comm.all_gather(comm.all_ok(own)?).concat();
        let subset =
            subset.without(|place| broken.iter().any(|broken| broken.sample == place as u64));
        Ok(Self { subset, broken })
    }

    /// Checks the share of broken images.
    ///
    /// Errors: more images are broken than `allowed`, the stage's `data.broken_rate`.
    pub(super) fn check_rate(&self, allowed: Option<f64>) -> Result<()> {
        let Some(first) = self.broken.first() else {
            return Ok(());
        };
        let (broken, all) = (self.broken.len(), self.broken.len() + self.subset.len());
        let message = match allowed {
            Some(rate) if broken as f64 <= rate * all as f64 => return Ok(()),
            Some(rate) => format!(
                "{broken} of {all} test images are broken, above data.broken_rate = {rate}; the first is {first}"
            ),
            None => format!("{broken} of {all} test images are broken; the first is {first}"),
        };
        Err(Error::input(message)
            .hint("repair or remove them (`advxl data check` lists all), or raise data.broken_rate to leave them out"))
    }
}
