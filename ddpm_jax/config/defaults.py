"""Every field of a config, with its default and its meaning."""

from ml_collections import ConfigDict

DTYPES = ("float32", "bfloat16")
TRAINED = "trained"  # text.encoder that is not a folder
OBJECTIVES = ("diffusion", "autoencoder", "clip")
DECAYS = ("constant", "cosine", "linear")  # of the learning rate


def default_config() -> ConfigDict:
    """A config with every field. The values are the paper's for CIFAR-10 (Ho et al. 2020, appendix B)."""
    config = ConfigDict()
    config.seed = 0  # of the weights, the order of the images and all noise

    config.data = data = ConfigDict()
    data.source = "tfds"  # digits, numbers, tfds, folder or array
    data.name = "cifar10"  # of the tensorflow-datasets data set
    data.split = "train"  # of that data set
    data.path = ""  # of the folder, or of the .npz or .npy file
    data.data_dir = ""  # where tensorflow-datasets keeps its files; "": its default
    data.height = 32  # divisible by 2 ** (levels - 1)
    data.width = 32  # the same
    data.channels = 3  # 1: grey, 3: RGB
    data.num_digits = 2  # of each number, for source numbers
    data.held_out = ()  # numbers to leave out, for source numbers
    data.caption = ""  # the text feature of a tensorflow-datasets data set, for runs with captions
    data.flip = True  # random horizontal flips
    data.skip_broken = False  # ignore images of a folder that cannot be read
    data.cache_gib = 2.0  # a training set that is smaller when decoded is kept in memory
    data.num_workers = 0  # processes that decode a larger training set; 0: threads

    config.model = model = ConfigDict()
    model.channels = 128  # of the first level
    model.channel_multipliers = (1, 2, 2, 2)  # one for each level; the image is halved from one level to the next
    model.level_channels = ()  # the channels of each level themselves, as in (32, 48, 64); replaces the multipliers
    model.num_res_blocks = 2  # residual blocks in each level
    model.level_res_blocks = ()  # the residual blocks of each level, as in (2, 2, 3); replaces num_res_blocks
    model.attention_resolutions = (16,)  # attention in levels whose longer side is one of these
    model.attention_levels = ()  # on or off for each level, as in (False, True, False, False); replaces the resolutions
    model.middle_attention = True  # attention between the two blocks in the middle
    model.middle_attention_groups = -1  # of the norm before that attention; 0: no norm; -1: num_groups
    model.num_heads = 1  # of attention; divides the channels of every level that has it
    model.head_channels = 0  # channels of a head, as many as fit; replaces num_heads; 0: off
    model.attention_patch_size = 1  # side of the patches of pixels that attend to each other; 1: single pixels
    model.transformer_depth = 0  # blocks of the spatial transformer that replaces each attention; 0: attention alone
    model.cross_attention = "separate"  # attention to tokens: separate from self-attention, joint with it, or alone
    model.context_groups = 0  # groups of the norm of the tokens in each joint or alone attention; 0: no norm
    model.token_channels = 0  # width that the tokens are projected to first; 0: no projection
    model.pooling_heads = 0  # heads of the attention pooling that is added to the time embedding; 0: no pooling
    model.dropout = 0.1  # rate, in residual blocks
    model.num_groups = 32  # of group normalisation; divides the channels of every level
    model.norm_epsilon = 1e-6  # of group normalisation
    model.activation = "swish"  # in residual blocks: swish, gelu, mish or relu
    model.outer_activation = "swish"  # in the time embedding and before the last convolution; the same choices
    model.residual_scale = 1.0  # divides the sum that ends a residual block
    model.middle_residual_scale = 1.0  # the same for the blocks in the middle
    model.skip_scale = 1.0  # multiplies the skip connections; 0.7071 in Imagen's Efficient U-Net
    model.time_embedding = "sinusoids"  # or learned: a vector for each timestep
    model.time_frequency_shift = 1.0  # of the sinusoids, from 0 (as in Stable Diffusion) to 1 (as in the paper)
    model.time_cosines_first = False  # cosines come before sines
    model.time_channels = 0  # width of the time embedding; 0: four times model.channels
    model.time_activations = ()  # applied in turn to the time embedding before residual blocks; (): model.activation
    model.vector_embedding = "linear"  # of a vector that is added to the time embedding: linear, mlp or none
    model.scale_shift = False  # the time embedding scales and shifts norms (AdaGN); the paper adds it
    model.downsample = "conv"  # conv, avg_pool, max_pool or residual
    model.downsample_padding = "same"  # of conv: same, at the right and bottom, or symmetric, as PyTorch's
    model.downsample_levels = ()  # one for each halving of the size, as in ("conv", "residual"); replaces downsample
    model.upsample = "nearest"  # nearest, transposed or residual
    model.upsample_levels = ()  # one for each doubling, in the order of downsample_levels; replaces upsample
    model.center_input = False  # the network sees 2 x - 1
    model.class_conditional = False  # learn the classes of the data set
    model.null_class = True  # a class-conditional network also has a null class, which guidance needs
    model.masked_picture = False  # the network also takes a mask, and the picture's latents with grey under the mask
    model.dtype = "float32"  # or bfloat16: the dtype of convolutions and matrix products
    model.remat = "none"  # norms or blocks: recompute them in the backward pass, to save memory

    config.text = text = ConfigDict()
    text.encoder = ""  # "": no captions; trained: along with the network; a transformers folder; or a CLIP's workdir
    text.tokenizer = ""  # a transformers folder or tokenizer.json; "": the encoder's, or one trained on the captions
    text.vocab_size = 512  # largest vocabulary of a tokenizer trained on the captions
    text.max_length = 0  # most tokens of a caption, which is cut if longer; 0: from the tokenizer's files, or 64
    text.width = 64  # of an encoder that is trained, like the next two fields
    text.num_layers = 2  # of its Transformer; 0: only the embeddings of tokens and positions
    text.num_heads = 4  # of its attention
    text.dropout = 0.1  # share of examples without their caption, for guidance
    text.mask_padding = True  # the network does not attend to the padding of a caption
    text.mask_in_encoder = False  # if mask_padding is off: the frozen encoder ignores padding, as in DeepFloyd IF
    text.pooled = True  # the state of the whole caption is added to the time embedding

    config.autoencoder = autoencoder = ConfigDict()
    autoencoder.source = ""  # workdir or diffusers folder of the autoencoder whose latents are diffused; "": pixels
    autoencoder.scaling_factor = 0.0  # of the latents; 0: the folder's, or measured on the data for a workdir
    autoencoder.latent_channels = 4  # of an autoencoder that is trained (train.objective), like the next fields
    autoencoder.level_channels = (128, 256, 512, 512)  # one for each level; the image is halved from one to the next
    autoencoder.num_res_blocks = 2  # residual blocks in each level
    autoencoder.num_groups = 32  # of group normalisation
    autoencoder.middle_attention = True  # attention between the two blocks in the middle
    autoencoder.kl_weight = 1e-6  # of the Kullback-Leibler divergence, beside the mean absolute error of the pixels

    config.clip = clip = ConfigDict()  # of a CLIP that is trained (train.objective); its text encoder: config.text
    clip.patch_size = 4  # of the image encoder, in pixels; divides data.height and data.width
    clip.width = 256  # of the image encoder's states
    clip.num_layers = 6  # of its Transformer
    clip.num_heads = 4  # of its attention
    clip.projection = 256  # width of the embeddings that pictures and texts share

    config.prior = prior = ConfigDict()
    prior.clip = ""  # workdir or folder of the CLIP whose image embeddings a prior diffuses; "": no prior
    prior.width = 256  # of the prior's Transformer
    prior.num_layers = 4  # of the Transformer
    prior.num_heads = 4  # of its attention
    prior.candidates = 2  # embeddings to draw for each text; the one that matches it best is kept
    prior.mean = ()  # mean of embeddings; the network sees (embedding - mean) / std; (): scaled to length sqrt(width)
    prior.std = ()  # standard deviation of embeddings; see prior.mean

    config.embedding = embedding = ConfigDict()
    embedding.clip = ""  # workdir or folder of the CLIP whose image embedding is an input, as in DALL-E 2; "": none
    embedding.normalized = True  # the embedding is scaled to length sqrt(width); False: CLIP's own length
    embedding.dropout = 0.1  # share of examples without it, for guidance
    embedding.num_tokens = 4  # made from the embedding, in addition to the text's
    embedding.token_width = 64  # width of the tokens that the network attends to: the embedding's and the text's

    config.upscale = upscale = ConfigDict()
    upscale.height = 0  # of low-resolution pictures, which the run enlarges to data.height and data.width; 0: none
    upscale.width = 0  # the same
    upscale.max_augmentation = 0.5  # noise added to these pictures in training, up to this share of T; 0: no noise
    upscale.augmentation = 0.1  # noise added to these pictures in sampling, as a share of T
    upscale.enlarging = "linear"  # interpolation of these pictures: linear, corners (aligned corner pixels) or cubic
    upscale.own_last_step = False  # the network of the lowest timestep has weights of its own, as in Karlo

    config.diffusion = diffusion = ConfigDict()
    diffusion.schedule = "linear"  # linear, quadratic, constant, jsd, warmup10, warmup50, cosine or sigmoid
    diffusion.num_timesteps = 1000  # T
    diffusion.beta_start = 1e-4  # first beta of linear, quadratic and the warm-ups
    diffusion.beta_end = 0.02  # last beta of linear, quadratic and the warm-ups; the only one of constant
    diffusion.schedule_options = ConfigDict()  # of the cosine and sigmoid schedules
    diffusion.betas = ()  # your own betas, which replace all of the above
    diffusion.zero_terminal_snr = False  # rescale the betas so that the last timestep is pure noise; for x_0 and v
    diffusion.prediction = "eps"  # eps, x_0 or v
    diffusion.variance = "fixed_large"  # fixed_small, fixed_large or learned
    diffusion.loss = "simple"  # simple, hybrid or vlb
    diffusion.weighting = "none"  # none, min_snr, p2 or truncated_snr
    diffusion.vlb_weight = 1e-3  # of the bound in the hybrid loss
    diffusion.timestep_sampler = "uniform"  # uniform, stratified or importance
    diffusion.clip = True  # clip the predicted x_0 to [-clip_range, clip_range] when sampling
    diffusion.clip_range = 1.0  # 1 for images; larger for embeddings, whose values are larger
    diffusion.dynamic_threshold = 0.0  # a quantile such as 0.995 for dynamic thresholding; 0: off
    diffusion.threshold_limit = 0.0  # the largest threshold of dynamic thresholding; 0: any

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adam"  # any of optax
    optimizer.learning_rate = 2e-4  # after the warm-up
    optimizer.decay = "constant"  # constant, cosine or linear, after the warm-up
    optimizer.decay_steps = 0  # the step at which the learning rate reaches 0; 0: train.num_steps
    optimizer.warmup_steps = 5000  # steps over which the learning rate rises from 0
    optimizer.grad_clip = 1.0  # global norm; 0: off
    optimizer.options = ConfigDict()  # further arguments of the optax optimiser: b1, b2, eps, weight_decay, ...

    config.train = train = ConfigDict()
    train.objective = "diffusion"  # or, for use by other runs, autoencoder (autoencoder.source) or clip (text.encoder)
    train.batch_size = 128  # of all devices together
    train.num_steps = 800_000  # of the whole run
    train.ema_decays = (0.9999,)  # decays of the moving averages; pictures use the first
    train.label_dropout = 0.0  # share of examples without their class, for guidance
    train.accumulation = 1  # parts of a batch whose gradients are computed one after the other, to save memory
    train.steps_per_dispatch = 1  # steps that the host starts at once, for accelerators
    train.init_from = ""  # a workdir whose averaged weights this run starts from

    config.lora = lora = ConfigDict()
    lora.rank = 0  # of LoRA adapters for attention's projections, trained instead of the network; 0: train the network
    lora.alpha = 0.0  # the adapters are multiplied by alpha / rank; 0: alpha is the rank
    lora.text_encoder = False  # adapters for the attention of the frozen text encoder, too, which then runs every step

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # devices over which only the batch is sharded; -1: those that fsdp leaves
    mesh.fsdp = 1  # devices over which parameters, averages and optimiser state are sharded, too

    config.log = log = ConfigDict()
    log.every_steps = 100  # a line of metrics.jsonl
    log.tensorboard = True  # the same for TensorBoard
    log.wandb = ""  # project of Weights & Biases; "": none
    log.sample_every_steps = 5000  # a grid of EMA samples; 0: none
    log.sample_images = 64  # in that grid
    log.sample_steps = 250  # sampling steps for these; 0: every timestep

    config.evaluate = evaluate = ConfigDict()
    evaluate.every_steps = 0  # bits/dim and a Frechet distance, or a CLIP's retrieval, during training; 0: none
    evaluate.likelihood_images = 128  # images whose bits/dim is estimated; 0: none
    evaluate.num_images = 512  # samples whose Frechet distance is taken, or a CLIP's pictures; 0: none
    evaluate.num_real = 10_000  # training images to compare them with
    evaluate.sampler = "dpmpp_2m"  # of these samples
    evaluate.num_steps = 20  # sampling steps for them
    evaluate.features = ""  # digits, inception or the file of its weights; "": chosen by the images' size

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 5000  # steps between two checkpoints
    checkpoint.every_minutes = 0.0  # also save after this many minutes; 0: off
    checkpoint.keep = 3  # number of checkpoints to keep, the newest

    config.sample = sample = ConfigDict()
    sample.sampler = "ddpm"  # ddpm, ddim, dpmpp_2m, dpmpp_2m_sde, heun, unipc or plms
    sample.num_steps = 0  # number of sampling steps; 0: every timestep
    sample.spacing = ""  # linspace, leading, trailing, quadratic, logsnr or karras; "": the sampler's default
    sample.spacing_offset = 0  # added to the timesteps of the leading spacing
    sample.skip_lowest = False  # use the highest num_steps of num_steps + 1 timesteps
    sample.stop_at_first = False  # end at the first timestep's noise level, not at the clean image
    sample.levels = ""  # noise levels that may lie between timesteps: linspace, karras, logsnr; "": the timesteps' own
    sample.fractional = False  # with sample.levels, call the network at fractional timesteps, not at the nearest ones
    sample.scaled_start = False  # start from noise of the first level's size, not of variance 1
    sample.eta = 0.0  # of ddim: 0, deterministic, to 1
    sample.order = 0  # of unipc: 1, 2 or 3; 0: 2
    sample.guidance_scale = 1.0  # classifier-free guidance towards classes or prompts; 1: none; above 1: exaggerated
    sample.guidance_rescale = 0.0  # 0 to 1: restores the contrast of the output without guidance
    sample.guidance_interval = ()  # (lowest, highest) guided timestep; (): all
    sample.num_images = 64  # in the grid at the end of training
    sample.batch_size = 256  # images at a time
    return config
