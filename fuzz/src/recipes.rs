//! Recipes with overrides, and progress files of evaluations.

use advxl::fuzzing;
use advxl::recipe::{Recipe, cannot_be_run};

use crate::scratch::parts;

/// Input: TOML, a zero byte, one override per line. A valid recipe reads back as itself from its own text.
pub fn recipe(data: &[u8]) {
    let [text, overrides] = parts(data, 0).map(String::from_utf8_lossy);
    let overrides: Vec<String> = overrides.lines().map(str::to_owned).collect();
    let recipe = match Recipe::parse(&text, &overrides) {
        Ok(recipe) => recipe,
        Err(faults) => {
            assert!(!faults.is_empty(), "refused without a reason");
            let message = cannot_be_run("a.toml", &faults).to_string();
            return assert!(message.len() > 10);
        }
    };
    let written = recipe.to_toml();
    let again = match Recipe::parse(&written, &[]) {
        Ok(again) => again.to_toml(),
        Err(faults) => panic!("{}", cannot_be_run(&written, &faults)),
    };
    assert!(
        again == written,
        "read back as\n{again}\nafter writing\n{written}"
    );
    let rehearsal = recipe.rehearsal(None).to_toml();
    if let Err(faults) = Recipe::parse(&rehearsal, &[]) {
        panic!("the rehearsal: {}", cannot_be_run(&rehearsal, &faults));
    }
    recipe.samples();
    recipe.paper_macs();
    for stage in &recipe.stage {
        for phase in &stage.phases {
            recipe.tokens(phase);
            recipe.forward_macs(phase);
        }
    }
}

/// Reads a progress file unmodified, and with a valid hash. Written and read again, it gives the same numbers.
pub fn progress(data: &[u8]) {
    for bytes in [data, &[&fuzzing::hash(data), data].concat()] {
        if let Some(written) = fuzzing::progress(bytes) {
            assert!(
                fuzzing::progress(&written).as_ref() == Some(&written),
                "reading again gives different numbers"
            );
        }
    }
}
