//! Reads the pickle inside a PyTorch file without executing anything in it.
//!
//! A pickle is a program for a small stack machine: most instructions build plain values, and some call a function that
//! the file names. This reader knows only the few functions that build tensors. The result of any other function is an
//! opaque value, which may accompany the weights but is ignored. Functions that can run code are refused by name.
//!
//! Memory use is proportional to the size of the pickle, even for hostile files: text is borrowed from it, an
//! instruction creates at most one value of constant size, and containers are indices of lists, so nothing is copied
//! and nothing nests in memory.
//!
//! Source: the comments of Python's `pickletools`; `torch/_utils.py` for the known functions.

use std::collections::HashMap;

use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::storage::archive::shown;

/// Instruction limit. A tensor takes about 50 instructions, so this is enough for 40,000 tensors. The values created by
/// two million instructions take at most 300 MB.
const INSTRUCTIONS: usize = 2_000_000;

/// Python modules that weights do not need and that can run code, or read or write files.
const CODE_MODULES: &str = "_pickle asyncio bdb code codeop commands ctypes http imp importlib \
    marshal multiprocessing nt operator os pdb pickle pip platform posix pty requests runpy shutil \
    signal socket subprocess sys tempfile threading timeit urllib webbrowser";

/// Python built-ins that only hold values; other built-ins can do more.
const PLAIN_BUILTINS: &str = "bool bytearray bytes complex dict float frozenset int list object \
    range set slice str tuple";

/// A value on the stack. Its numbers are indices into the lists of [`Pickle`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum Value<'a> {
    /// A value that is not needed to find weights: `None`, a bool, a float, bytes.
    Plain,
    Integer(i64),
    Text(&'a str),
    /// A list, tuple or set.
    Sequence(usize),
    Dictionary(usize),
    /// A function or type.
    Global(usize),
    /// The result of an unknown function or type.
    Opaque(usize),
    Storage(usize),
    Tensor(usize),
}

/// The elements of one or several tensors, stored in an entry of the archive.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Storage<'a> {
    pub(crate) dtype: Dtype,
    pub(crate) key: &'a str,
}

/// A view of a storage; offset and strides count elements.
#[derive(Clone, Copy, Debug)]
struct Tensor {
    storage: usize,
    offset: i64,
    /// Indices of the sequences of sizes and strides.
    shape: usize,
    strides: usize,
}

/// A tensor whose offset, sizes and strides were checked.
pub(crate) struct View<'a> {
    pub(crate) storage: Storage<'a>,
    pub(crate) offset: usize,
    pub(crate) shape: Vec<usize>,
    pub(crate) strides: Vec<usize>,
}

/// What a pickle builds: one value and everything that it refers to.
#[derive(Default)]
pub(crate) struct Pickle<'a> {
    sequences: Vec<Vec<Value<'a>>>,
    dictionaries: Vec<Vec<(Value<'a>, Value<'a>)>>,
    globals: Vec<(&'a str, &'a str)>,
    storages: Vec<Storage<'a>>,
    tensors: Vec<Tensor>,
}

impl<'a> Pickle<'a> {
    /// Interprets a pickle to its end; returns the value that it builds.
    ///
    /// Errors: a damaged pickle, instructions that PyTorch does not write, or a function that can run code.
    pub(crate) fn read(bytes: &'a [u8]) -> Result<(Self, Value<'a>)> {
        let mut machine = Machine {
            rest: bytes,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            made: Self::default(),
        };
        for _ in 0..INSTRUCTIONS {
            let [instruction] = machine.array()?;
            if instruction == b'.' {
                let made = machine.pop()?;
                return Ok((machine.made, made));
            }
            machine.follow(instruction)?;
        }
        Err(damaged("more instructions than weights need"))
    }

    /// Returns the pairs of a dictionary in order; none for any other value.
    pub(crate) fn pairs(&self, value: Value) -> &[(Value<'a>, Value<'a>)] {
        match value {
            Value::Dictionary(place) => &self.dictionaries[place],
            _ => &[],
        }
    }

    /// Returns a tensor with its sizes, or `None` if they are invalid.
    pub(crate) fn view(&self, tensor: usize) -> Option<View<'a>> {
        let tensor = self.tensors[tensor];
        let sizes = |place: usize| -> Option<Vec<usize>> {
            let values = &self.sequences[place];
            // PyTorch tensors have at most 64 dimensions.
            let values = values.get(..values.len().min(65))?.iter();
            let size = |value: &Value| match value {
                Value::Integer(size) => usize::try_from(*size).ok(),
                _ => None,
            };
            values.map(size).collect()
        };
        let view = View {
            storage: self.storages[tensor.storage],
            offset: usize::try_from(tensor.offset).ok()?,
            shape: sizes(tensor.shape)?,
            strides: sizes(tensor.strides)?,
        };
        (view.shape.len() == view.strides.len() && view.shape.len() <= 64).then_some(view)
    }

    /// Describes a value in words.
    pub(crate) fn describe(&self, value: Value) -> String {
        let name = |place: usize| {
            let (module, name) = self.globals[place];
            format!("`{}.{}`", shown(module), shown(name))
        };
        match value {
            Value::Plain => "a plain value".into(),
            Value::Integer(number) => format!("the number {number}"),
            Value::Text(_) => "a string".into(),
            Value::Sequence(_) => "a list".into(),
            Value::Dictionary(_) => "a dictionary".into(),
            Value::Global(place) => format!("the function or type {}", name(place)),
            Value::Opaque(place) => format!("an object made by {}", name(place)),
            Value::Storage(_) => "a storage".into(),
            Value::Tensor(_) => "a tensor".into(),
        }
    }
}

struct Machine<'a> {
    /// Remaining instructions.
    rest: &'a [u8],
    stack: Vec<Value<'a>>,
    /// Stack heights to which later instructions return.
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    made: Pickle<'a>,
}

impl<'a> Machine<'a> {
    /// Interprets one instruction. The comments give the names from `pickletools`.
    fn follow(&mut self, instruction: u8) -> Result<()> {
        match instruction {
            0x80 => drop(self.take(1)?),               // PROTO
            0x95 => drop(self.take(8)?),               // FRAME
            b'(' => self.marks.push(self.stack.len()), // MARK
            b'0' => match self.pop() {
                Ok(_) => {}                         // POP
                Err(_) => drop(self.since_mark()?), // or a mark, if nothing is above it
            },
            b'1' => drop(self.since_mark()?), // POP_MARK
            b'2' => {
                let top = self.top()?; // DUP
                self.stack.push(top);
            }

            b'N' | 0x88 | 0x89 => self.stack.push(Value::Plain), // NONE, NEWTRUE, NEWFALSE
            b'G' => {
                self.take(8)?; // BINFLOAT
                self.stack.push(Value::Plain);
            }
            b'K' => self.integer(1)?, // BININT1
            b'M' => self.integer(2)?, // BININT2
            b'J' => {
                let number = i32::from_le_bytes(self.array()?); // BININT
                self.stack.push(Value::Integer(number.into()));
            }
            0x8a => self.long(1)?,       // LONG1
            0x8b => self.long(4)?,       // LONG4
            b'X' => self.text(4)?,       // BINUNICODE
            0x8c => self.text(1)?,       // SHORT_BINUNICODE
            0x8d => self.text(8)?,       // BINUNICODE8
            b'T' | b'B' => self.raw(4)?, // BINSTRING, BINBYTES
            b'U' | b'C' => self.raw(1)?, // SHORT_BINSTRING, SHORT_BINBYTES
            0x8e | 0x96 => self.raw(8)?, // BINBYTES8, BYTEARRAY8

            b')' | b']' | 0x8f => self.sequence(Vec::new()), // EMPTY_TUPLE, EMPTY_LIST, EMPTY_SET
            b't' | b'l' | 0x91 => {
                let values = self.since_mark()?; // TUPLE, LIST, FROZENSET
                self.sequence(values);
            }
            0x85..=0x87 => {
                let count = usize::from(instruction - 0x84); // TUPLE1, TUPLE2, TUPLE3
                let mut values = (0..count).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
                values.reverse();
                self.sequence(values);
            }
            b'a' => {
                let value = self.pop()?; // APPEND
                self.append(vec![value])?;
            }
            b'e' | 0x90 => {
                let values = self.since_mark()?; // APPENDS, ADDITEMS
                self.append(values)?;
            }
            b'}' => self.dictionary(), // EMPTY_DICT
            b'd' => {
                let values = self.since_mark()?; // DICT
                self.dictionary();
                self.set(&values)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?); // SETITEM
                self.set(&[key, value])?;
            }
            b'u' => {
                let values = self.since_mark()?; // SETITEMS
                self.set(&values)?;
            }

            b'q' => {
                let place = self.number(1)?; // BINPUT
                self.memorize(place as u32)?;
            }
            b'r' => {
                let place = self.number(4)?; // LONG_BINPUT
                self.memorize(place as u32)?;
            }
            0x94 => self.memorize(self.memo.len() as u32)?, // MEMOIZE
            b'h' => self.recall(1)?,                        // BINGET
            b'j' => self.recall(4)?,                        // LONG_BINGET

            b'c' => {
                let (module, name) = (self.line()?, self.line()?); // GLOBAL
                self.global(module, name)?;
            }
            b'i' => {
                let (module, name) = (self.line()?, self.line()?); // INST
                let arguments = self.since_mark()?;
                self.global(module, name)?;
                self.sequence(arguments);
                self.call()?;
            }
            0x93 => match (self.pop()?, self.pop()?) {
                (Value::Text(name), Value::Text(module)) => self.global(module, name)?, // STACK_GLOBAL
                _ => return Err(damaged("a function name is not a string")),
            },
            b'R' | 0x81 => self.call()?, // REDUCE, NEWOBJ
            0x92 => {
                self.pop()?; // NEWOBJ_EX: arguments by name
                self.call()?;
            }
            b'b' => drop(self.pop()?), // BUILD: attributes of what is below
            b'Q' => self.storage()?,   // BINPERSID
            other => {
                let message = format!("instruction {other:#04x}, which PyTorch does not write");
                return Err(damaged(&message));
            }
        }
        Ok(())
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self
            .rest
            .split_at_checked(count)
            .ok_or_else(|| damaged("unexpected end"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let taken = self.take(N)?;
        Ok(taken.try_into().expect("`take` returns N bytes"))
    }

    /// Reads an unsigned integer of up to 8 bytes.
    fn number(&mut self, bytes: usize) -> Result<u64> {
        let mut number = [0; 8];
        number[..bytes].copy_from_slice(self.take(bytes)?);
        Ok(u64::from_le_bytes(number))
    }

    /// Reads a byte count, then that many bytes.
    fn counted(&mut self, bytes_of_count: usize) -> Result<&'a [u8]> {
        let count = self.number(bytes_of_count)?;
        self.take(usize::try_from(count).unwrap_or(usize::MAX))
    }

    fn line(&mut self) -> Result<&'a str> {
        let end = self.rest.iter().position(|byte| *byte == b'\n');
        let line = self.take(end.ok_or_else(|| damaged("unexpected end"))?)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|_| damaged("a string is not UTF-8"))
    }

    fn integer(&mut self, bytes: usize) -> Result<()> {
        let number = self.number(bytes)?;
        self.stack.push(Value::Integer(number as i64));
        Ok(())
    }

    /// Reads a two's complement integer of variable length; a plain value if it has more than 8 bytes.
    fn long(&mut self, bytes_of_count: usize) -> Result<()> {
        let bytes = self.counted(bytes_of_count)?;
        let fill = if bytes.last().is_some_and(|last| *last >= 0x80) {
            0xff
        } else {
            0
        };
        let mut number = [fill; 8];
        self.stack.push(match number.get_mut(..bytes.len()) {
            Some(low) => {
                low.copy_from_slice(bytes);
                Value::Integer(i64::from_le_bytes(number))
            }
            None => Value::Plain,
        });
        Ok(())
    }

    fn text(&mut self, bytes_of_count: usize) -> Result<()> {
        let bytes = self.counted(bytes_of_count)?;
        let text = std::str::from_utf8(bytes).map_err(|_| damaged("a string is not UTF-8"))?;
        self.stack.push(Value::Text(text));
        Ok(())
    }

    fn raw(&mut self, bytes_of_count: usize) -> Result<()> {
        self.counted(bytes_of_count)?;
        self.stack.push(Value::Plain);
        Ok(())
    }

    fn top(&self) -> Result<Value<'a>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let top = self.stack.get(floor..).and_then(|above| above.last());
        top.copied().ok_or_else(|| damaged("stack underflow"))
    }

    fn pop(&mut self) -> Result<Value<'a>> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    /// Pops all values pushed since the last mark.
    fn since_mark(&mut self) -> Result<Vec<Value<'a>>> {
        let mark = self.marks.pop().ok_or_else(|| damaged("missing mark"))?;
        Ok(self.stack.split_off(mark))
    }

    fn sequence(&mut self, values: Vec<Value<'a>>) {
        self.stack.push(Value::Sequence(self.made.sequences.len()));
        self.made.sequences.push(values);
    }

    fn dictionary(&mut self) {
        self.stack
            .push(Value::Dictionary(self.made.dictionaries.len()));
        self.made.dictionaries.push(Vec::new());
    }

    fn append(&mut self, values: Vec<Value<'a>>) -> Result<()> {
        match self.top()? {
            Value::Sequence(place) => self.made.sequences[place].extend(values),
            Value::Opaque(_) => {}
            _ => return Err(damaged("it appends to a value that is not a list")),
        }
        Ok(())
    }

    /// Inserts alternating keys and values into the dictionary on top.
    fn set(&mut self, values: &[Value<'a>]) -> Result<()> {
        let (pairs, []) = values.as_chunks::<2>() else {
            return Err(damaged("a key has no value"));
        };
        match self.top()? {
            Value::Dictionary(place) => {
                let pairs = pairs.iter().map(|[key, value]| (*key, *value));
                self.made.dictionaries[place].extend(pairs);
            }
            Value::Opaque(_) => {}
            _ => return Err(damaged("it sets a key of a value that is not a dictionary")),
        }
        Ok(())
    }

    fn memorize(&mut self, place: u32) -> Result<()> {
        let top = self.top()?;
        self.memo.insert(place, top);
        Ok(())
    }

    fn recall(&mut self, bytes: usize) -> Result<()> {
        let place = self.number(bytes)? as u32;
        let value = self
            .memo
            .get(&place)
            .ok_or_else(|| damaged("unknown memo entry"))?;
        self.stack.push(*value);
        Ok(())
    }

    fn global(&mut self, module: &'a str, name: &'a str) -> Result<()> {
        if runs_code(module, name) {
            let message = format!(
                "this file tries to run `{}.{}`; only weights are read, and nothing was executed",
                shown(module),
                shown(name)
            );
            return Err(Error::input(message)
                .hint("do not load it in other programs; ask its author for a safetensors file"));
        }
        self.stack.push(Value::Global(self.made.globals.len()));
        self.made.globals.push((module, name));
        Ok(())
    }

    /// Evaluates a known function; any other gives an opaque value.
    fn call(&mut self) -> Result<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let (place, arguments) = match (function, arguments) {
            (Value::Global(place), Value::Sequence(arguments)) => {
                (place, &self.made.sequences[arguments])
            }
            (Value::Opaque(place), _) | (Value::Global(place), _) => {
                self.stack.push(Value::Opaque(place));
                return Ok(());
            }
            _ => return Err(damaged("it calls a value that is not a function")),
        };
        let value = match (self.made.globals[place], &arguments[..]) {
            (("collections", "OrderedDict"), []) => {
                self.dictionary();
                return Ok(());
            }
            (
                ("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor"),
                &[
                    Value::Storage(storage),
                    Value::Integer(offset),
                    Value::Sequence(shape),
                    Value::Sequence(strides),
                    ..,
                ],
            ) => {
                self.made.tensors.push(Tensor {
                    storage,
                    offset,
                    shape,
                    strides,
                });
                Value::Tensor(self.made.tensors.len() - 1)
            }
            // A tensor of an unknown dtype.
            (("torch._utils", "_rebuild_tensor_v2"), [unknown @ Value::Opaque(_), ..]) => *unknown,
            (
                ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state"),
                [tensor @ (Value::Tensor(_) | Value::Opaque(_)), ..],
            ) => *tensor,
            _ => Value::Opaque(place),
        };
        self.stack.push(value);
        Ok(())
    }

    /// Reads `("storage", type, key, device, count)`, PyTorch's reference to an entry of the archive.
    fn storage(&mut self) -> Result<()> {
        let id = match self.pop()? {
            Value::Sequence(place) => &self.made.sequences[place][..],
            _ => &[],
        };
        let &[
            Value::Text("storage"),
            Value::Global(class),
            Value::Text(key),
            ..,
        ] = id
        else {
            return Err(damaged("it refers to something that is not a storage"));
        };
        let dtype = match self.made.globals[class] {
            ("torch" | "torch.cuda", name) => dtype(name),
            _ => None,
        };
        self.stack.push(match dtype {
            None => Value::Opaque(class),
            Some(dtype) => {
                self.made.storages.push(Storage { dtype, key });
                Value::Storage(self.made.storages.len() - 1)
            }
        });
        Ok(())
    }
}

/// Returns the dtype of one of PyTorch's storage classes.
fn dtype(class: &str) -> Option<Dtype> {
    Some(match class {
        "FloatStorage" => Dtype::F32,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::BF16,
        "DoubleStorage" => Dtype::F64,
        "LongStorage" => Dtype::I64,
        "IntStorage" => Dtype::I32,
        "ShortStorage" => Dtype::I16,
        "CharStorage" => Dtype::I8,
        "ByteStorage" => Dtype::U8,
        "BoolStorage" => Dtype::BOOL,
        _ => return None,
    })
}

/// Returns whether a function can do more than create a value.
fn runs_code(module: &str, name: &str) -> bool {
    let listed = |list: &str, word: &str| list.split(' ').any(|listed| listed == word);
    let package = module.split('.').next().unwrap_or_default();
    // `os.system` can also be written as the name `os.system` in a module that imports `os`.
    let mut modules = std::iter::once(package).chain(name.rsplit('.').skip(1));
    modules.any(|module| listed(CODE_MODULES, module))
        || match package {
            "builtins" | "__builtin__" => !listed(PLAIN_BUILTINS, name),
            "types" => name != "SimpleNamespace",
            _ => false,
        }
}

fn damaged(what: &str) -> Error {
    Error::input(format!(
        "the pickle in this PyTorch file is damaged: {what}"
    ))
    .hint("copy or download the file again, or save the weights as safetensors")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(bytes: &[u8]) -> String {
        match Pickle::read(bytes) {
            Err(error) => error.to_string(),
            Ok((pickle, made)) => panic!("it was read as {}", pickle.describe(made)),
        }
    }

    #[test]
    fn functions_that_run_code_are_refused_by_name_however_they_are_written() {
        for (pickle, name) in [
            (&b"cos\nsystem\n(X\x02\0\0\0lstR."[..], "`os.system`"),
            (b"cposix\nsystem\n.", "`posix.system`"),
            (
                b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
                "`builtins.eval`",
            ),
            (b"c__builtin__\ngetattr\n.", "`__builtin__.getattr`"),
            (b"(ios\nsystem\n.", "`os.system`"),
            (b"\x8c\x05torch\x8c\x09os.system\x93.", "`torch.os.system`"),
            (
                b"cimportlib.util\nmodule_from_spec\n.",
                "`importlib.util.module_from_spec`",
            ),
        ] {
            let text = refusal(pickle);
            assert!(text.contains(&format!("tries to run {name}")), "{text}");
            assert!(text.contains("nothing was executed"), "{text}");
        }
    }

    #[test]
    fn results_of_unknown_functions_are_opaque_and_can_be_filled() {
        // A call, a key set in the result, a value appended to it, its attributes set.
        let bytes = b"cnumpy\nthing\n)RK\x01K\x02sK\x03aK\x04b.";
        let (pickle, made) = Pickle::read(bytes).unwrap();
        assert_eq!(pickle.describe(made), "an object made by `numpy.thing`");
    }

    #[test]
    fn integers_keep_their_sign_and_length() {
        for (bytes, number) in [
            (&b"K\xff."[..], 255),
            (b"M\xff\xff.", 65_535),
            (b"J\xff\xff\xff\xff.", -1),
            (b"\x8a\x00.", 0),
            (b"\x8a\x01\x80.", -128),
            (b"\x8a\x05\0\0\0\0\x01.", 1 << 32),
        ] {
            let (_, made) = Pickle::read(bytes).unwrap();
            assert!(
                matches!(made, Value::Integer(found) if found == number),
                "{made:?}"
            );
        }
        // No size of a tensor has more than 64 bits.
        let (_, made) = Pickle::read(b"\x8a\x09\0\0\0\0\0\0\0\0\x01.").unwrap();
        assert!(matches!(made, Value::Plain), "{made:?}");
    }

    #[test]
    fn lengths_past_the_end_and_missing_values_are_damage() {
        for bytes in [
            &b""[..],
            b"K",
            b".",
            b"X\xff\xff\xff\xffabc",
            b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc",
            b"\x8b\xff\xff\xff\xff",
            b"t.",
            b"(R.",
            b"h\x05.",
            b"}(K\x01u.",
            b"N)R.",
            b"K\x01Q.",
            b"X\x01\0\0\0\xff.",
            b"\xff.",
            b"cos",
        ] {
            let text = refusal(bytes);
            assert!(
                text.contains("the pickle in this PyTorch file is damaged"),
                "{text}"
            );
        }
    }

    #[test]
    fn a_million_nested_lists_and_a_dictionary_of_itself_are_read_and_dropped() {
        let mut bytes = vec![b']'; 900_000];
        bytes.resize(1_800_000, b'a');
        bytes[1_799_999] = b'.';
        Pickle::read(&bytes).unwrap();
        let (pickle, made) = Pickle::read(b"}q\0X\x05\0\0\0modelh\0s.").unwrap();
        assert_eq!(pickle.pairs(made).len(), 1);
    }

    #[test]
    fn an_endless_pickle_is_refused() {
        let text = refusal(&vec![b'N'; INSTRUCTIONS + 1]);
        assert!(
            text.contains("more instructions than weights need"),
            "{text}"
        );
    }
}
