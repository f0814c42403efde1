//! The few names a pickled state dict may refer to. Any other is refused before anything is done with it.

use super::super::safetensors::Dtype;
use crate::error::{Error, Result};

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Global {
    /// `collections.OrderedDict` and `dict`.
    Dict,
    /// `torch.Size`, which is a tuple.
    Size,
    /// `torch.device`: read and forgotten.
    Device,
    /// `torch.FloatStorage` and its kind; none for the storage without a type.
    Storage(Option<Dtype>),
    /// `torch.float32` and its kind.
    Dtype(Dtype),
    /// `torch.Tensor`, `torch.nn.Parameter`.
    TensorType,
    RebuildTensor,
    /// With the dtype as an argument.
    RebuildTypedTensor,
    RebuildParameter,
    /// A tensor with Python attributes, which are forgotten.
    RebuildFromType,
}

/// The meaning of `module.name`; an unknown one is an error that says why it is not looked up.
pub(super) fn resolve(file: &str, module: &str, name: &str) -> Result<Global> {
    let known = match (module, name) {
        ("collections", "OrderedDict") | ("builtins" | "__builtin__", "dict") => Some(Global::Dict),
        ("torch", "Size") => Some(Global::Size),
        ("torch", "device") => Some(Global::Device),
        ("torch", "Tensor") | ("torch.nn.parameter" | "torch.nn", "Parameter") => Some(Global::TensorType),
        ("torch.storage" | "torch", "UntypedStorage") => Some(Global::Storage(None)),
        ("torch._utils", "_rebuild_tensor_v2") => Some(Global::RebuildTensor),
        ("torch._utils", "_rebuild_tensor_v3") => Some(Global::RebuildTypedTensor),
        ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => Some(Global::RebuildParameter),
        ("torch._tensor", "_rebuild_from_type_v2") => Some(Global::RebuildFromType),
        ("torch", name) => storage(name).map(|dtype| Global::Storage(Some(dtype))).or(dtype(name).map(Global::Dtype)),
        _ => None,
    };
    known.ok_or_else(|| {
        let shown = format!("{module}.{name}");
        let error = Error::data(format!(
            "{file} refers to the Python object `{}`, which no state dict needs: refused, and nothing of it was run",
            shown.escape_debug()
        ));
        if shown.starts_with("__torch__") || module.starts_with("torch.jit") {
            return error.hint("this is a TorchScript program: save the model's state_dict() instead");
        }
        if shown.starts_with("torch.") {
            return error.hint("only plain dense tensors are read: save them as such, best as safetensors");
        }
        error.hint("if you trust the file, open it in PyTorch and save model.state_dict() alone, best as safetensors")
    })
}

fn storage(name: &str) -> Option<Dtype> {
    Some(match name {
        "DoubleStorage" => Dtype::F64,
        "FloatStorage" => Dtype::F32,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::BF16,
        "LongStorage" => Dtype::I64,
        "IntStorage" => Dtype::I32,
        "ShortStorage" => Dtype::I16,
        "CharStorage" => Dtype::I8,
        "ByteStorage" => Dtype::U8,
        "BoolStorage" => Dtype::BOOL,
        _ => return None,
    })
}

fn dtype(name: &str) -> Option<Dtype> {
    Some(match name {
        "float64" => Dtype::F64,
        "float32" => Dtype::F32,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        "float8_e4m3fn" => Dtype::F8_E4M3,
        "float8_e5m2" => Dtype::F8_E5M2,
        "int64" => Dtype::I64,
        "int32" => Dtype::I32,
        "int16" => Dtype::I16,
        "int8" => Dtype::I8,
        "uint64" => Dtype::U64,
        "uint32" => Dtype::U32,
        "uint16" => Dtype::U16,
        "uint8" => Dtype::U8,
        "bool" => Dtype::BOOL,
        _ => return None,
    })
}
