//! User errors give a clear message and exit code 2; nothing is lost and nothing panics.

mod support;

use std::path::Path;

use support::{advxl, write_recipe};

/// Asserts that the program exits with code 2 and a message that contains all `parts`.
#[track_caller]
fn refuses(arguments: &[&str], parts: &[&str]) {
    let (code, text) = advxl(arguments);
    assert_eq!(code, 2, "{text}");
    assert!(!text.contains("panicked"), "{text}");
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in:\n{text}");
    }
}

/// Asserts that training the test recipe with overrides in a fresh folder is refused.
#[track_caller]
fn refuses_recipe(overrides: &[&str], parts: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path());
    let out = folder.path().join("run");
    let mut arguments = vec![
        "train",
        recipe.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
    ];
    for change in overrides {
        arguments.extend(["--set", change]);
    }
    refuses(&arguments, parts);
    assert!(
        !out.exists(),
        "an invalid recipe must not create a run folder"
    );
}

#[test]
fn a_missing_recipe_is_named() {
    refuses(
        &["train", "no/recipe.toml"],
        &[
            "cannot read `no/recipe.toml`",
            "hint: pass the path of a recipe",
        ],
    );
}

#[test]
fn an_unknown_key_is_refused_with_the_nearest_known_one() {
    refuses_recipe(
        &["stage.finetune.attack.step_szie=1"],
        &[
            "stage `finetune`",
            "unknown key `step_szie` in `attack`",
            "did you mean `step_size`?",
        ],
    );
}

#[test]
fn errors_in_several_tables_are_reported_at_once() {
    refuses_recipe(
        &[
            "stage.finetune.attack.epsilon=\"8/0\"",
            "stage.pretrain.batch=0",
            "stage.finetune.phases.0.image_size=33",
            "model.heads=5",
            "model.norm_eps=0.0",
            "seed=-1",
        ],
        &[
            "is invalid: 6 errors",
            "`8/0` divides by zero",
            "batch = 0 must be at least 1",
            "image_size = 33 is not a multiple of the patch size 4",
            "hint: use 32 or 36",
            "heads = 5 must divide width = 32",
            "norm_eps = 0 must be above 0",
            "seed = -1: expected a whole number, 0 or more",
        ],
    );
}

#[test]
fn names_that_would_be_paths_are_refused_and_nothing_is_written() {
    let long = format!("stage.pretrain.name={}", "x".repeat(300));
    for name in ["../../evil", "/abs/dir", "", ".", "..", "a b", "-x", ".x"] {
        let change = format!("stage.pretrain.name=\"{name}\"");
        refuses_recipe(
            &[&change],
            &["invalid file name", "hint: use 1 to 64 letters"],
        );
    }
    refuses_recipe(&[&long], &["invalid file name `xxxx", "xxxx...`"]);
    refuses_recipe(
        &["stage.pretrain.name=Finetune"],
        &["`stage` names `Finetune` and `finetune` differ only in case"],
    );
    let evaluation = |name: &str| {
        format!(
            "{{ name = \"{name}\", images = 8, attacks = [\"pgd\"], norm = \"linf\", epsilon = \"2/255\" }}"
        )
    };
    let list = |names: [&str; 2]| {
        let [one, other] = names.map(evaluation);
        format!("final_evaluation=[{one}, {other}]")
    };
    refuses_recipe(&[&list(["a", "../b"])], &["name: invalid file name `../b`"]);
    refuses_recipe(
        &[&list(["a", "a"])],
        &["two `final_evaluation` tables are named `a`"],
    );
    refuses_recipe(&[&list(["a", "A"])], &["`a` and `A` differ only in case"]);
    refuses(
        &[
            "export", "x", "--to", "timm", "--name", "../x", "--out", "y",
        ],
        &["--name: invalid file name `../x`"],
    );
    refuses(
        &["train", "recipes/...toml"],
        &["cannot read `recipes/...toml`"],
    );
}

#[test]
fn out_of_range_numbers_are_refused_with_the_range_and_no_other_error() {
    for (change, message) in [
        ("model.heads=0", "heads = 0 must be at least 1"),
        (
            "model.depth=-1",
            "depth = -1: expected a whole number, 0 or more",
        ),
        (
            "model.width=4000000000",
            "width = 4000000000 must be at most 65536",
        ),
        (
            "stage.pretrain.batch=99999999999",
            "must be at most 16777216",
        ),
        (
            "stage.pretrain.phases.0.image_size=100000",
            "must be at most 4096",
        ),
        (
            "stage.pretrain.attack.steps=9999999999",
            "must be at most 1000000",
        ),
        (
            "seed=18446744073709551616",
            "seed: 18446744073709551616 is too large; the maximum is 18446744073709551615",
        ),
    ] {
        refuses_recipe(&[change], &["is invalid: 1 error\n", message]);
    }
}

#[test]
fn a_warmup_longer_than_its_stage_is_refused_and_so_is_an_epsilon_beyond_pixels() {
    refuses_recipe(
        &["stage.pretrain.attack_warmup_samples=224"],
        &[
            "attack_warmup_samples = 224 is longer than the stage (192 samples)",
            "use at most 192",
        ],
    );
    let last = "final_evaluation=[{ name = \"a\", images = 8, attacks = [\"pgd\"], norm = \"linf\", epsilon = 8 }]";
    refuses_recipe(
        &[last],
        &[
            "epsilon is larger than the range of a pixel",
            "8/255, not 8",
        ],
    );
}

#[test]
fn samples_that_do_not_fill_their_batches_are_refused_with_the_neighbors() {
    refuses_recipe(
        &["stage.finetune.phases.0.samples=100"],
        &[
            "samples = 100 is not a multiple of the batch size 32",
            "use 96 or 128",
        ],
    );
}

#[test]
fn a_data_folder_with_one_class_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let class = folder.path().join("data/cat");
    std::fs::create_dir_all(&class).unwrap();
    write_png(&class.join("a.png"));
    let data = folder.path().join("data");
    refuses_recipe(
        &[
            &format!("data.train={}", data.display()),
            &format!("data.test={}", data.display()),
        ],
        &["class"],
    );
}

#[test]
fn a_cifar_file_of_the_wrong_length_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(
        folder.path().join("data_batch_1.bin"),
        vec![0; 3073 * 2 + 5],
    )
    .unwrap();
    std::fs::write(folder.path().join("test_batch.bin"), vec![0; 3073]).unwrap();
    let data = folder.path().display();
    refuses_recipe(
        &[&format!("data.train={data}"), &format!("data.test={data}")],
        &["data_batch_1.bin", "6151", "3073"],
    );
}

#[test]
fn a_truncated_jpeg_ends_the_run_with_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    for class in ["cat", "dog"] {
        std::fs::create_dir_all(data.join(class)).unwrap();
        for index in 0..20 {
            write_png(&data.join(class).join(format!("{index}.png")));
        }
    }
    // Only the beginning of a JPEG.
    let begun = [
        0xff, 0xd8, 0xff, 0xe0, 0, 16, b'J', b'F', b'I', b'F', 0, 1, 1, 0, 0, 1, 0, 1, 0, 0,
    ];
    std::fs::write(data.join("dog/broken.jpg"), begun).unwrap();
    let recipe = write_recipe(folder.path());
    let out = folder.path().join("run");
    let set = |key: &str| format!("data.{key}={}", data.display());
    refuses(
        &[
            "train",
            recipe.to_str().unwrap(),
            "--out",
            out.to_str().unwrap(),
            "--set",
            &set("train"),
            "--set",
            &set("test"),
            "--set",
            "data.test_on_train=true",
        ],
        &["broken.jpg"],
    );
}

#[test]
fn an_output_folder_that_cannot_be_made_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path());
    let file = folder.path().join("file");
    std::fs::write(&file, "mine").unwrap();
    let out = file.join("run");
    refuses(
        &[
            "train",
            recipe.to_str().unwrap(),
            "--out",
            out.to_str().unwrap(),
        ],
        &["cannot create the folder", "file/run"],
    );
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "mine");
}

#[test]
fn a_folder_with_other_files_is_not_written_to() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path());
    let out = folder.path().join("thesis");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("chapter1.tex"), "years of work").unwrap();
    refuses(
        &[
            "train",
            recipe.to_str().unwrap(),
            "--out",
            out.to_str().unwrap(),
        ],
        &[
            "is not empty and is not a run folder",
            "hint: choose another folder",
        ],
    );
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 1);
}

#[test]
fn a_run_continues_with_another_recipe_only_with_accept_changes() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path());
    let out = folder.path().join("run");
    let first = [
        "train",
        recipe.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
    ];
    let (code, text) = advxl(&first);
    assert_eq!(code, 0, "{text}");
    let changed = [
        &first[..],
        &["--set", "stage.finetune.attack.steps=3", "--set", "seed=4"],
    ]
    .concat();
    refuses(
        &changed,
        &[
            "2 keys changed",
            "seed: 3 -> 4",
            "stage.1.attack.steps: 2 -> 3",
            "--accept-changes",
        ],
    );
    let accepted = [&changed[..], &["--accept-changes"]].concat();
    let (code, text) = advxl(&accepted);
    assert_eq!(code, 0, "{text}");
}

#[test]
fn paths_that_are_not_models_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let rest = ["--data", "synthetic:8", "--eps", "8/255"];
    refuses(
        &[&["eval", path], &rest[..]].concat(),
        &["is not a model folder"],
    );

    std::fs::write(folder.path().join("config.json"), "{}").unwrap();
    std::fs::write(folder.path().join("model.safetensors"), "<html>").unwrap();
    refuses(
        &[&["eval", path], &rest[..]].concat(),
        &["this is a web page, not a weights file"],
    );
}

#[test]
fn an_evaluation_without_its_epsilon_or_with_an_unknown_attack_is_refused() {
    refuses(
        &["eval", "x", "--data", "synthetic:8"],
        &["--eps is missing", "8/255"],
    );
    refuses(
        &["eval", "x", "--data", "synthetic:8", "--attack", "magic"],
        &["--attack: unknown attack `magic`"],
    );
    refuses(
        &["eval", "x", "--data", "synthetic:8", "--eps", "8/0"],
        &["divides by zero"],
    );
    let rest = ["eval", "x", "--data", "synthetic:8"];
    let asked = |more: &[&'static str]| [&rest[..], more].concat();
    refuses(
        &asked(&["--eps", "8/255", "--attack", "autoatack"]),
        &["unknown attack `autoatack`", "did you mean `autoattack`?"],
    );
    refuses(
        &asked(&["--eps", "8/255", "--norm", "linf,l2"]),
        &[
            "--eps has 1 values, but --norm has 2",
            "use one value per norm",
        ],
    );
    refuses(
        &asked(&["--eps", "8"]),
        &["larger than the range of a pixel", "8/255, not 8"],
    );
    refuses(
        &asked(&["--eps", "8/255", "--version", "rnd"]),
        &[
            "--version: unknown version `rnd`",
            "standard, plus, rand or fast",
        ],
    );
    refuses(
        &asked(&["--eps", "8/255", "--targets", "0"]),
        &["--targets must be at least 1, got 0"],
    );
}

/// Writes a gray image of 8 x 8 pixels.
fn write_png(path: &Path) {
    image::GrayImage::from_pixel(8, 8, image::Luma([128]))
        .save(path)
        .unwrap();
}

#[test]
fn an_evaluation_of_nothing_is_refused_and_nothing_is_saved() {
    let folder = tempfile::tempdir().unwrap();
    let run = support::trained(folder.path());
    let run = run.to_str().unwrap();
    let out = folder.path().join("out");
    let given = [
        "eval",
        run,
        "--data",
        "synthetic:16",
        "--out",
        out.to_str().unwrap(),
    ];
    for (more, parts) in [
        (&["--n", "0", "--eps", "8/255"][..], &["0"][..]),
        (
            &["--batch", "0", "--eps", "8/255"],
            &["--batch must be at least 1, got 0"],
        ),
        (
            &["--steps", "0", "--eps", "8/255"],
            &["--steps must be at least 1, got 0"],
        ),
        (
            &["--queries", "0", "--eps", "8/255"],
            &["--queries must be at least 1, got 0"],
        ),
        (
            &["--restarts", "0", "--eps", "8/255"],
            &["--restarts must be at least 1, got 0"],
        ),
        (
            &["--step-size", "0", "--eps", "8/255"],
            &["--step-size must be above 0, got 0"],
        ),
        (
            &["--targets", "0", "--eps", "8/255"],
            &["--targets must be at least 1, got 0"],
        ),
        (
            &["--steps", "18446744073709551615", "--eps", "8/255"],
            &["--steps must be at most 1000000000, got 18446744073709551615"],
        ),
        (&["--attack", "", "--eps", "8/255"], &["--attack is empty"]),
        (&["--attack", ",", "--eps", "8/255"], &["--attack is empty"]),
        (
            &["--attack", "clean", "--eps", "0", "--eps-curve"],
            &["--eps-curve", "has only one point"],
        ),
        (
            &["--norm", "linf,linf", "--eps", "8/255,8/255"],
            &["--norm linf with --eps 8/255 is given twice"],
        ),
        (
            &[
                "--norm",
                "l2,l2",
                "--eps",
                "0.5,1",
                "--save-adversarial",
                "a.safetensors",
            ],
            &["--save-adversarial: --norm l2 is given twice"],
        ),
    ] {
        refuses(&[&given[..], more].concat(), parts);
        let left = std::fs::read_dir(&out).map_or(0, |entries| entries.count());
        assert_eq!(left, 0, "{more:?}");
    }
}
