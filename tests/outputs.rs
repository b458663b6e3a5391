//! Output paths of commands, and output that cannot be written.

mod support;

use std::fs::File;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Stdio;

use support::{advxl, class_folders, command, trained, write_recipe};

#[track_caller]
fn refuses(arguments: &[&str], part: &str) {
    let (code, text) = advxl(arguments);
    assert_eq!(code, 2, "{arguments:?}: {text}");
    assert!(
        text.contains(part),
        "{arguments:?}: `{part}` is not in:\n{text}"
    );
}

#[track_caller]
fn succeeds(arguments: &[&str]) {
    let (code, text) = advxl(arguments);
    assert_eq!(code, 0, "{arguments:?}: {text}");
}

#[test]
fn an_output_never_replaces_an_input_under_any_of_its_names() {
    let folder = tempfile::tempdir().unwrap();
    let run = trained(folder.path());
    let run = run.to_str().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let images = path("images.safetensors");
    succeeds(&[
        "data",
        "pack",
        "synthetic:8",
        "--image-size",
        "32",
        "--out",
        &images,
    ]);
    let before = std::fs::read(&images).unwrap();
    symlink(&images, path("link")).unwrap();
    std::fs::hard_link(&images, path("hard")).unwrap();
    let data = format!("tensors:{images}");
    let read = "is read by this command";
    for out in [
        "images.safetensors",
        "run/../images.safetensors",
        "link",
        "hard",
    ] {
        let out = path(out);
        refuses(&["predict", run, "--data", &data, "--out", &out], read);
        let attack = ["--eps", "1/255", "--save-adversarial", &out];
        refuses(
            &[
                &["eval", run, "--data", &data, "--out", &path("eval")],
                &attack[..],
            ]
            .concat(),
            read,
        );
        refuses(
            &["data", "pack", &data, "--image-size", "32", "--out", &out],
            read,
        );
        refuses(&["data", "check", &data, "--out", &out], read);
    }
    assert!(std::fs::read(&images).unwrap() == before);

    let captions = path("captions.txt");
    std::fs::write(&captions, "a cat\n").unwrap();
    symlink(&captions, path("also")).unwrap();
    for out in [&captions, &path("also")] {
        refuses(
            &["embed", "no-model", "--captions", &captions, "--out", out],
            read,
        );
    }
    refuses(&["export", run, "--to", "timm", "--out", run], read);
    refuses(
        &["export", run, "--to", "timm", "--out", &path("run/model")],
        read,
    );
    let weights = path("run/model/model.safetensors");
    refuses(
        &["predict", run, "--data", "synthetic:4", "--out", &weights],
        read,
    );

    // Results may be written next to the model, and replace earlier ones.
    let logits = path("run/logits.safetensors");
    for _ in 0..2 {
        succeeds(&["predict", run, "--data", "synthetic:4", "--out", &logits]);
    }
    refuses(
        &[
            "data",
            "pack",
            "synthetic:4",
            "--image-size",
            "16",
            "--out",
            &logits,
        ],
        "already exists and is not a safetensors file with `images`",
    );
}

#[test]
fn no_folder_is_created_among_images_and_no_run_overwrites_its_start_weights() {
    let folder = tempfile::tempdir().unwrap();
    let run = trained(folder.path());
    let recipe = write_recipe(folder.path());
    let (run, recipe) = (run.to_str().unwrap(), recipe.to_str().unwrap());
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    class_folders(Path::new(&path("data")), &["cat", "dog"], 4);
    let data = path("data");
    let set = format!("data.train={data}");
    for out in ["data", "data/run", "data/cat/run"] {
        let out = path(out);
        refuses(
            &["train", recipe, "--set", &set, "--out", &out],
            "(data.train)",
        );
        let eval = [
            "eval", run, "--data", &data, "--eps", "1/255", "--out", &out,
        ];
        refuses(&eval, "is read by this command (--data)");
    }
    assert_eq!(std::fs::read_dir(&data).unwrap().count(), 2);
    // The user's recipe is not overwritten either.
    let own = path("own");
    std::fs::create_dir(&own).unwrap();
    let written = write_recipe(Path::new(&own));
    let before = std::fs::read(&written).unwrap();
    refuses(
        &[
            "train",
            written.to_str().unwrap(),
            "--out",
            &own,
            "--accept-changes",
        ],
        "which the run would overwrite",
    );
    assert!(std::fs::read(&written).unwrap() == before);
    let weights = format!("start={{ weights = \"{run}\", head = \"keep\" }}");
    refuses(
        &[
            "train",
            recipe,
            "--set",
            &weights,
            "--accept-changes",
            "--out",
            run,
        ],
        "would overwrite start.weights",
    );
}

#[test]
fn an_output_that_cannot_be_written_is_refused_before_the_work() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder
        .path()
        .join("no/folder/out")
        .to_str()
        .unwrap()
        .to_owned();
    // The model is not even opened.
    for (out, part) in [
        (&missing[..], "no such file or directory"),
        ("/dev/null", "it is not a regular file"),
        ("/dev/stdout", "it is not a regular file"),
        ("/", "it is a folder"),
    ] {
        refuses(
            &["predict", "no-model", "--data", "synthetic:4", "--out", out],
            part,
        );
        refuses(
            &["embed", "no-model", "--captions", "none", "--out", out],
            part,
        );
        refuses(
            &[
                "data",
                "pack",
                "synthetic:4",
                "--image-size",
                "16",
                "--out",
                out,
            ],
            part,
        );
    }
}

#[test]
fn a_result_that_cannot_be_printed_is_a_failure_but_a_closed_pipe_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path());
    let recipe = recipe.to_str().unwrap();
    for arguments in [
        &["inspect", "vit_b16"][..],
        &["inspect", "vit_b16", "--json"],
        &["plan", recipe, "--device-tflops", "1"],
        &["train", recipe, "--dry-run"],
        &["data", "check", "synthetic:8"],
        &["--help"],
        &["train", "--help"],
        &["--version"],
    ] {
        let full = File::create("/dev/full").unwrap();
        let output = command(arguments).stdout(full).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
        assert!(
            text.contains("error: cannot write to `standard output`: no space left on device"),
            "{arguments:?}: {text}"
        );

        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = command(arguments).stdout(writer).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {text}");
    }
}

#[test]
fn training_continues_when_log_lines_cannot_be_written() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path());
    let train = |name: &str, stderr: Stdio| {
        let out = folder.path().join(name);
        let arguments = [
            "train",
            recipe.to_str().unwrap(),
            "--out",
            out.to_str().unwrap(),
        ];
        let output = command(&arguments).stderr(stderr).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{name}");
        assert!(out.join("checkpoints/000000000320.safetensors").is_file());
        String::from_utf8(output.stderr).unwrap()
    };
    train("full", File::create("/dev/full").unwrap().into());
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    train("closed", writer.into());

    // The disk is full only for the log and the metrics.
    let run = folder.path().join("lost");
    std::fs::create_dir(&run).unwrap();
    std::fs::copy(
        folder.path().join("full/recipe.toml"),
        run.join("recipe.toml"),
    )
    .unwrap();
    symlink("/dev/full", run.join("metrics.jsonl")).unwrap();
    symlink("/dev/full", run.join("log.txt")).unwrap();
    let text = train("lost", Stdio::piped());
    assert_eq!(
        text.matches("warning: log lines are lost: cannot write")
            .count(),
        1,
        "{text}"
    );
}
