"""Every field of a run with its default and its meaning."""

from ml_collections import ConfigDict

DTYPES = ("float32", "bfloat16")
TRAINED = "trained"  # text.encoder that is not a folder
OBJECTIVES = ("diffusion", "autoencoder", "clip")
DECAYS = ("constant", "cosine", "linear")  # of the learning rate


def default_config() -> ConfigDict:
    """Every field of a run. The values are the paper's for CIFAR-10 (Ho et al. 2020, appendix B)."""
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
    data.num_digits = 2  # of each number of source numbers
    data.held_out = ()  # numbers that source numbers leaves out
    data.caption = ""  # the text feature of a tensorflow-datasets data set, for runs with captions
    data.flip = True  # random horizontal flips
    data.skip_broken = False  # go on without the images of a folder that cannot be read
    data.cache_gib = 2.0  # a set that is smaller when decoded is decoded once and kept in memory
    data.num_workers = 0  # processes that decode a larger set; 0: threads

    config.model = model = ConfigDict()
    model.channels = 128  # of the first level
    model.channel_multipliers = (1, 2, 2, 2)  # one for each level; the image is halved from one level to the next
    model.level_channels = ()  # the channels of each level themselves, as in (32, 48, 64); replaces the multipliers
    model.num_res_blocks = 2  # residual blocks in each level
    model.level_res_blocks = ()  # the residual blocks of each level, as in (2, 2, 3); replaces num_res_blocks
    model.attention_resolutions = (16,)  # levels whose longer side is one of these have attention
    model.attention_levels = ()  # on or off for each level, as in (False, True, False, False); replaces the resolutions
    model.middle_attention = True  # attention between the two blocks in the middle
    model.middle_attention_groups = -1  # of the norm before that attention; 0: no norm; -1: num_groups
    model.num_heads = 1  # of attention; divides the channels of every level that has it
    model.head_channels = 0  # channels of a head, as many as fit; replaces num_heads; 0: off
    model.attention_patch_size = 1  # attention among patches of so many pixels a side, not single ones
    model.transformer_depth = 0  # blocks of the spatial transformer that replaces each attention; 0: attention alone
    model.cross_attention = "separate"  # of pixels to tokens: separate, joint with the pixels' own, or alone
    model.context_groups = 0  # of a group norm of the tokens in each joint or alone attention; 0: no norm
    model.token_channels = 0  # what the tokens are projected to first; 0: they are not
    model.pooling_heads = 0  # of an attention pooling of the tokens, added to the time embedding; 0: none
    model.dropout = 0.1  # rate, in residual blocks
    model.num_groups = 32  # of group normalisation; divides the channels of every level
    model.norm_epsilon = 1e-6  # of group normalisation
    model.activation = "swish"  # in residual blocks: swish, gelu, mish or relu
    model.outer_activation = "swish"  # in the time embedding and before the last convolution: the same names
    model.residual_scale = 1.0  # divides the sum that ends a residual block
    model.middle_residual_scale = 1.0  # the same for the blocks in the middle
    model.time_embedding = "sinusoids"  # or learned: a vector for each timestep
    model.time_frequency_shift = 1.0  # of the sinusoids: 0, as in Stable Diffusion, to 1, as in the paper
    model.time_cosines_first = False  # the embedding is cosines, then sines
    model.time_channels = 0  # width of the time embedding; 0: four times model.channels
    model.time_activations = ()  # of the time embedding, in turn, before residual blocks; (): activation
    model.vector_embedding = "linear"  # of a vector that is added to the time embedding: linear, mlp or none
    model.scale_shift = False  # the time embedding scales and shifts norms (AdaGN), where the paper adds it
    model.downsample = "conv"  # conv, avg_pool, max_pool or residual
    model.downsample_padding = "same"  # of conv: same, at the right and bottom, or symmetric, as PyTorch's
    model.downsample_levels = ()  # one for each halving of the size, as in ("conv", "residual"); replaces downsample
    model.upsample = "nearest"  # nearest, transposed or residual
    model.upsample_levels = ()  # one for each doubling, in the order of downsample_levels; replaces upsample
    model.center_input = False  # the network sees 2 x - 1
    model.class_conditional = False  # learn the classes of the data set
    model.null_class = True  # a class-conditional network also knows no class, which guidance needs
    model.masked_picture = False  # it is given a mask and the latents of the picture without what is under it
    model.dtype = "float32"  # or bfloat16: the dtype of convolutions and matrix products
    model.remat = "none"  # norms or blocks: recompute those instead of keeping them, for memory

    config.text = text = ConfigDict()
    text.encoder = ""  # "": no captions; trained: along with the network; a transformers folder; or a CLIP's workdir
    text.tokenizer = ""  # a transformers folder or tokenizer.json; "": the encoder's, or one trained on the captions
    text.vocab_size = 512  # tokens of a tokenizer that is trained, at most
    text.max_length = 0  # tokens of a caption, the rest is cut; 0: as the tokenizer's files say, 64 if it is trained
    text.width = 64  # of an encoder that is trained, like the two that follow
    text.num_layers = 2  # of its Transformer; 0: the embeddings of tokens and of their places alone
    text.num_heads = 4  # of its attention
    text.dropout = 0.1  # share of examples that are trained without their caption, for guidance
    text.mask_padding = True  # the network does not attend to the padding of a caption
    text.mask_in_encoder = False  # with mask_padding off: the frozen encoder leaves it aside, as in DeepFloyd IF
    text.pooled = True  # the state of the whole caption is added to the time embedding

    config.autoencoder = autoencoder = ConfigDict()
    autoencoder.source = ""  # workdir or diffusers folder of the autoencoder whose latents are diffused; "": pixels are
    autoencoder.scaling_factor = 0.0  # of the latents; 0: the folder's, or for a workdir measured on the data
    autoencoder.latent_channels = 4  # of an autoencoder that is trained (train.objective), like all that follow
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
    prior.clip = ""  # workdir or folder of the CLIP whose image embeddings are diffused, by a prior; "": pictures are
    prior.width = 256  # of the prior's Transformer
    prior.num_layers = 4  # of the Transformer
    prior.num_heads = 4  # of its attention
    prior.candidates = 2  # embeddings that sampling draws, of which the one that suits the text best is kept
    prior.mean = ()  # of embeddings, which the network sees as (embedding - mean) / std; (): of length sqrt(width)
    prior.std = ()  # the same

    config.embedding = embedding = ConfigDict()
    embedding.clip = ""  # of the CLIP whose image embedding the network is given, as DALL-E 2's decoder is; "": none
    embedding.normalized = True  # to length 1, and times the root of the width; False: as CLIP gives it
    embedding.dropout = 0.1  # share of examples that are trained without it, for guidance
    embedding.num_tokens = 4  # that it becomes, beside those of the text
    embedding.token_width = 64  # of all these tokens

    config.upscale = upscale = ConfigDict()
    upscale.height = 0  # of the pictures that the run enlarges to data.height and data.width; 0: it enlarges none
    upscale.width = 0  # the same
    upscale.max_augmentation = 0.5  # training noises them up to this share of the timesteps; 0: they are not noised
    upscale.augmentation = 0.1  # the share to which sampling noises them
    upscale.enlarging = "linear"  # how they are enlarged: linear, corners (linear between corner pixels) or cubic
    upscale.own_last_step = False  # the network of the lowest timestep has weights of its own, as in Karlo

    config.diffusion = diffusion = ConfigDict()
    diffusion.schedule = "linear"  # linear, quadratic, constant, jsd, warmup10, warmup50, cosine or sigmoid
    diffusion.num_timesteps = 1000  # T
    diffusion.beta_start = 1e-4  # of linear, quadratic and the warm-ups
    diffusion.beta_end = 0.02  # of these and of constant
    diffusion.schedule_options = ConfigDict()  # of the cosine and sigmoid schedules
    diffusion.betas = ()  # the user's own betas; they take the place of all of the above
    diffusion.zero_terminal_snr = False  # rescale the betas so that the last timestep is pure noise; for x_0 and v
    diffusion.prediction = "eps"  # eps, x_0 or v
    diffusion.variance = "fixed_large"  # fixed_small, fixed_large or learned
    diffusion.loss = "simple"  # simple, hybrid or vlb
    diffusion.weighting = "none"  # none, min_snr, p2 or truncated_snr
    diffusion.vlb_weight = 1e-3  # of the bound in the hybrid loss
    diffusion.timestep_sampler = "uniform"  # uniform, stratified or importance
    diffusion.clip = True  # the predicted x_0 to [-clip_range, clip_range] when sampling
    diffusion.clip_range = 1.0  # 1 for images; larger for embeddings, whose values lie further out
    diffusion.dynamic_threshold = 0.0  # a quantile such as 0.995 for dynamic thresholding; 0: off
    diffusion.threshold_limit = 0.0  # the largest threshold of dynamic thresholding; 0: any

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adam"  # any of optax
    optimizer.learning_rate = 2e-4  # after the warm-up
    optimizer.decay = "constant"  # constant, cosine or linear, after the warm-up
    optimizer.decay_steps = 0  # the step at which the learning rate has reached 0; 0: train.num_steps
    optimizer.warmup_steps = 5000  # in which the learning rate rises from 0
    optimizer.grad_clip = 1.0  # global norm; 0: off
    optimizer.options = ConfigDict()  # further arguments of the optax optimiser: b1, b2, eps, weight_decay, ...

    config.train = train = ConfigDict()
    train.objective = "diffusion"  # or what other runs use: autoencoder, their autoencoder.source; clip, text.encoder
    train.batch_size = 128  # of all devices together
    train.num_steps = 800_000  # of the whole run
    train.ema_decays = (0.9999,)  # the first is the one that pictures are made with
    train.label_dropout = 0.0  # share of examples that are trained without their class, for guidance
    train.accumulation = 1  # in how many parts a batch's gradient is taken, one after the other, for memory
    train.steps_per_dispatch = 1  # that the host hands to an accelerator at once
    train.init_from = ""  # a workdir whose averaged weights this run starts from

    config.lora = lora = ConfigDict()
    lora.rank = 0  # of LoRA adapters for attention's projections, trained instead of the network; 0: train the network
    lora.alpha = 0.0  # the adapters are multiplied by alpha / rank; 0: alpha is the rank
    lora.text_encoder = False  # adapters for the attention of the frozen text encoder, too, which then runs every step

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # devices that divide the batch alone; -1: what fsdp leaves
    mesh.fsdp = 1  # devices that divide parameters, averages and optimiser state, too

    config.log = log = ConfigDict()
    log.every_steps = 100  # a line of metrics.jsonl
    log.tensorboard = True  # the same for TensorBoard
    log.wandb = ""  # project of Weights & Biases; "": none
    log.sample_every_steps = 5000  # a grid of EMA samples; 0: none
    log.sample_images = 64  # in that grid
    log.sample_steps = 250  # timesteps that these are sampled at; 0: every one

    config.evaluate = evaluate = ConfigDict()
    evaluate.every_steps = 0  # bits/dim and a Frechet distance on the way, or a CLIP's retrieval; 0: none
    evaluate.likelihood_images = 128  # whose bits/dim are estimated; 0: none
    evaluate.num_images = 512  # samples whose Frechet distance is taken, or a CLIP's pictures; 0: none
    evaluate.num_real = 10_000  # training images that they are compared with
    evaluate.sampler = "dpmpp_2m"  # of these samples
    evaluate.num_steps = 20  # timesteps that they are sampled at
    evaluate.features = ""  # digits, inception or the file of its weights; "": as the images' size asks

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 5000  # steps between two
    checkpoint.every_minutes = 0.0  # also after so many minutes; 0: off
    checkpoint.keep = 3  # of the newest

    config.sample = sample = ConfigDict()
    sample.sampler = "ddpm"  # ddpm, ddim, dpmpp_2m, dpmpp_2m_sde, heun, unipc or plms
    sample.num_steps = 0  # timesteps to call the network at; 0: every one
    sample.spacing = ""  # linspace, leading, trailing, quadratic, logsnr or karras; "": as suits the sampler
    sample.spacing_offset = 0  # added to the timesteps of the leading spacing
    sample.skip_lowest = False  # of num_steps + 1 timesteps, the lowest is left out
    sample.stop_at_first = False  # end at the first timestep's noise level, not at the clean image
    sample.levels = ""  # noise levels between timesteps too: linspace, karras or logsnr; "": the timesteps' own
    sample.fractional = False  # call the network at fractional timesteps there, not at the nearest
    sample.scaled_start = False  # start from noise of the first level's size, not of variance 1
    sample.eta = 0.0  # of ddim: 0, deterministic, to 1
    sample.order = 0  # of unipc: 1, 2 or 3; 0: 2
    sample.guidance_scale = 1.0  # of a class-conditional run: 1 is the class alone, more exaggerates it
    sample.guidance_rescale = 0.0  # 0 to 1: brings the guided output back to the usual contrast
    sample.guidance_interval = ()  # (lowest, highest) guided timestep; (): all
    sample.num_images = 64  # in the grid at the end of training
    sample.batch_size = 256  # images at a time
    return config
