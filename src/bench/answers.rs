//! Answers of a model with random weights, token by token.

use std::{ops::ControlFlow, time::Instant};

use crate::{
    error::{Error, Result},
    formats::{HostTensor, model_folder::ModelFolder, safetensors::Dtype},
    generate::{Options, generate},
    gpu::Gpu,
    models::{
        config::ModelConfig,
        llava::{Llava, Pictures},
        loading::{Loading, Quantization},
        names,
    },
    tensor,
};

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Prompts that are answered at once.
    pub sequences: usize,
    /// Positions of each prompt.
    pub prompt: usize,
    /// Tokens of each answer.
    pub tokens: usize,
    /// Answers that are timed.
    pub runs: usize,
}

impl Sizes {
    /// # Errors
    /// `Usage`: prompt and answer are longer than the model.
    pub fn check(self, config: &ModelConfig) -> Result<()> {
        let (prompt, tokens, positions) = (self.prompt, self.tokens, config.text().positions());
        if prompt + tokens <= positions {
            return Ok(());
        }
        Err(Error::usage(format!("{prompt} and {tokens} positions are more than the model's {positions}"))
            .hint("lower --seq or --tokens"))
    }
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct Times {
    /// Until the first token, of each run.
    pub prefill: Vec<f64>,
    /// Of each token after the first (of all sequences), over all runs.
    pub decode: Vec<f64>,
    pub parameters: u64,
    /// Bytes of weights that a step of decoding reads, and of keys and values, at the middle of the answer.
    pub weight_bytes: u64,
    pub cache_bytes: u64,
    pub device_bytes: u64,
}

/// Times the answers of a model of this config, kept in `precision`, or its decoder's linears in four bits.
///
/// # Errors
/// As [`Sizes::check`]; whatever fails on the device.
pub fn measure(
    gpu: &Gpu,
    config: &ModelConfig,
    precision: Option<tensor::Dtype>,
    quantization: Option<Quantization>,
    sizes: Sizes,
) -> Result<Times> {
    sizes.check(config)?;
    let text = config.text();
    let stored = match precision {
        Some(tensor::Dtype::F32) => Dtype::F32,
        Some(tensor::Dtype::F16) => Dtype::F16,
        _ => Dtype::BF16,
    };
    let folder = ModelFolder::random(config, stored, 0)?;
    let mut projector = |_: &str, shape: &[usize]| Ok(HostTensor::zeros(shape));
    let progress = &mut |_, _| ();
    let mut loading = Loading { quantization, ..Loading::of_frozen(precision, progress) };
    let model = Llava::load_with(gpu, &folder, config.clone(), false, &mut projector, &mut loading)?;
    gpu.sync()?;

    // Ids that differ, and none that ends an answer.
    let id = |sequence: usize, at: usize| ((at * 7919 + sequence * 104_729 + 3) % text.vocab_size) as i32;
    let prompt = |sequence| (0..sizes.prompt).map(|at| id(sequence, at)).collect();
    let prompts: Vec<Vec<i32>> = (0..sizes.sequences).map(prompt).collect();
    let options = Options::greedy(sizes.tokens, Vec::new());
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    // The first run compiles.
    for run in 0..=sizes.runs {
        let mut last = Instant::now();
        let mut told = 0;
        generate(&model, &prompts, Pictures::Pixels(&[]), &options, &mut |sequence, _| {
            // The first sequence hears of a step when all are through it.
            if sequence == 0 {
                let seconds = last.elapsed().as_secs_f64();
                last = Instant::now();
                if run > 0 {
                    if told == 0 { prefill.push(seconds) } else { decode.push(seconds) }
                }
                told += 1;
            }
            ControlFlow::Continue(())
        })?;
    }
    for seconds in [&mut prefill, &mut decode] {
        seconds.sort_by(f64::total_cmp);
    }
    let seen = sizes.prompt + sizes.tokens / 2;
    let width = text.num_key_value_heads * text.head_dim;
    Ok(Times {
        prefill,
        decode,
        parameters: model.parameters.elements() as u64,
        weight_bytes: weight_bytes(&model),
        cache_bytes: (sizes.sequences * 2 * text.num_hidden_layers * seen * width * 4) as u64,
        device_bytes: gpu.device_bytes(),
    })
}

/// Bytes of what a step reads whole: the decoder and the head, not the embeddings of which it takes a row.
fn weight_bytes(model: &Llava) -> u64 {
    let tied = model.config.text().tie_word_embeddings;
    let read = |name: &str| {
        name.starts_with(names::DECODER_LAYERS) || name == names::LM_HEAD || (tied && name == names::EMBED_TOKENS)
    };
    let bytes = |tensor: &tensor::Tensor| {
        let elements = tensor.len();
        // Four bits an element, and a factor of eight bits a block.
        if tensor.dtype().is_quantized() {
            elements / 2 + elements / crate::quant::BLOCK
        } else {
            elements * tensor.dtype().bytes()
        }
    };
    model.parameters.iter().filter(|one| read(&one.name)).map(|one| bytes(&one.value) as u64).sum()
}
