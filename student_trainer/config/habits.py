"""The names that flags have in TRL, transformers, axolotl, LLaMA-Factory and vLLM, for typos."""

# Each with the flags here that stand for it; a command suggests the first that it has.
HABITS = {
    other: flags
    for flags, others in (
        (
            ("model_name_or_path",),
            "model model_name model_id model_path base_model base_model_name student "
            "student_model student_model_name_or_path pretrained adapter_name_or_path adapter "
            "lora_path tokenizer tokenizer_name",
        ),
        (
            ("teacher_url",),
            "teacher teacher_model teacher_model_name_or_path teacher_model_server_url "
            "teacher_base_url vllm_server_url base_url url server host api_base",
        ),
        (("teacher_api_key_file",), "api_key api_key_file openai_api_key key"),
        (
            ("dataset_name", "suite"),
            "dataset datasets data data_path data_files dataset_path dataset_id train_file "
            "train_data train_dataset",
        ),
        (
            ("eval_dataset_name",),
            "eval_dataset eval_data eval_file validation_file val_file test_file test_datasets",
        ),
        (("dataset_split",), "split dataset_train_split train_split"),
        (("eval_dataset_split",), "dataset_test_split test_split eval_split"),
        (("dataset_config",), "dataset_config_name subset config_name"),
        (("prompt_column",), "dataset_text_field text_column input_column"),
        (("completion_column",), "response_column output_column target_column"),
        (("dataset_num_proc",), "preprocessing_num_workers dataset_processes num_proc"),
        (
            ("max_length",),
            "max_seq_length max_seq_len sequence_len seq_len cutoff_len model_max_length "
            "max_model_len context_length max_prompt_length",
        ),
        (
            ("max_new_tokens",),
            "max_completion_length max_tokens max_gen_toks max_response_length response_length",
        ),
        (("learning_rate",), "lr"),
        (("num_train_epochs",), "epochs num_epochs epoch"),
        (("max_steps",), "steps num_steps num_train_steps max_train_steps iters"),
        (
            ("per_device_train_batch_size", "generation_batch_size"),
            "batch_size bs micro_batch_size train_batch_size per_gpu_train_batch_size",
        ),
        (("per_device_eval_batch_size",), "eval_batch_size"),
        (("gradient_accumulation_steps",), "grad_accum grad_accum_steps accumulation_steps"),
        (("gradient_checkpointing",), "activation_checkpointing grad_checkpointing"),
        (("lr_scheduler_type",), "lr_scheduler scheduler schedule"),
        (("warmup_steps",), "warmup warmup_ratio"),
        (("weight_decay",), "wd"),
        (("max_grad_norm",), "clip grad_clip gradient_clipping clip_grad_norm"),
        (("optim",), "optimizer"),
        (("eval_strategy",), "evaluation_strategy eval"),
        (("eval_steps",), "eval_every val_check_interval evals_per_epoch"),
        (("save_steps",), "save_every saves_per_epoch"),
        (("logging_steps",), "log_every log_steps log_interval"),
        (("resume_from_checkpoint",), "resume auto_resume_from_checkpoints"),
        (("report_to",), "wandb use_wandb tensorboard log_with"),
        (("project",), "wandb_project"),
        (("use_cpu",), "no_cuda cpu"),
        (("output_dir",), "output out output_path out_dir save_path save_dir"),
        (("torch_dtype",), "precision"),
        (("attn_implementation",), "flash_attention flash_attn use_flash_attention_2 attn"),
        (("use_peft",), "peft lora use_lora"),
        (("lora_r",), "lora_rank rank"),
        (("lora_target_modules",), "lora_target target_modules lora_modules"),
        (("load_in_4bit",), "qlora use_4bit use_bnb_4bit quantization load_4bit"),
        (("packing",), "sample_packing padding_free"),
        (("loss_kernel",), "use_liger_loss use_liger_kernel_loss"),
        (("lmbda",), "lambda lambd gkd_lambda on_policy_fraction"),
        (("beta",), "gkd_beta jsd_beta kl_beta kd_beta alpha"),
        (("temperature",), "temp kd_temperature distill_temperature loss_temperature"),
        (
            ("top_k_logprobs",),
            "top_k topk topk_logprobs loss_top_k kd_top_k num_logprobs logprobs prompt_logprobs",
        ),
        (("rollout_engine",), "use_vllm vllm vllm_mode backend generation_backend"),
        (("vllm_gpu_memory_utilization",), "gpu_memory_utilization"),
        (("vllm_tensor_parallel_size",), "tensor_parallel_size tp vllm_tp"),
        (("vllm_enable_sleep_mode",), "enable_sleep_mode sleep_level"),
        (("rollout_top_p",), "top_p"),
        (("rollout_min_p",), "min_p"),
        (
            ("num_generations",),
            "rollout_n num_generations_per_prompt group_size samples_per_prompt "
            "n_samples_per_prompt",
        ),
        (("rollout_staleness",), "staleness max_staleness steps_ahead"),
        (("suite",), "task tasks benchmark benchmarks"),
        (("n",), "num_samples n_samples num_return_sequences k"),
        (("limit",), "num_problems max_samples"),
        (("check_timeout",), "timeout"),
        (("seed",), "random_seed"),
    )
    for other in others.split()
}
