// All words of the page, in both languages.  A value with {name} is filled in by t().

const EN = {
  skip: 'Skip to content', views: 'Views', overview: 'Overview', playground: 'Playground', logs: 'Logs', activity: 'Activity',
  live: 'Live', polling: 'Polling', offline: 'No connection', refused: 'No access', connecting: 'Connecting',
  theme_auto: 'Theme: as the system', theme_light: 'Theme: light', theme_dark: 'Theme: dark', other_language: '中文',
  simulated: 'The engine is simulated: no model is loaded, and every answer is made up.',
  config_error: 'The settings on disk are not in force: {error}',
  no_management: 'Management is not open to you here: {why}',
  limited: 'This key may chat, but not manage: enter an admin key to see instances, logs and activity.',
  devices: 'Devices', driver: 'driver {driver}, CUDA {cuda}', host_memory: 'Host memory', device: 'Device', others: 'other programs',
  free: '{bytes} free of {total}', busy: '{percent} busy', device_error: 'cannot be read: {error}',
  models: 'Models', models_about: '{ready} of {all} ready', load_other: 'Load another model', model: 'Model', state: 'State',
  memory: 'Memory', in_flight: 'In flight', waiting: 'Waiting', tokens_s: 'Tokens/s', ttft: 'First token', cache: 'Cache',
  idle_in: 'Idle in', actions: 'Actions', no_models: 'No model is configured or loaded. Load one, or name some in config.yaml.',
  servers: 'Servers', server: 'Server', health: 'Health', running: 'Running', capacity: 'Capacity', serves: 'Serves',
  servers_about: '{up} of {all} up', up: 'up', down: 'down', suspect: 'suspect', leaving: 'leaving', unknown: 'unknown',
  unloaded: 'not loaded', starting: 'loading', ready: 'ready', falling_asleep: 'falling asleep', sleeping: 'asleep', waking: 'waking',
  backoff: 'will be tried again', stopping: 'stopping', stopped: 'stopped', failed: 'failed', draining: 'requests finish first',
  waiting_for_old_instance: 'waits for its predecessor', waiting_for_memory: 'waits for memory', waiting_for_device: 'waits for its turn',
  resolving: 'resolving', initializing: 'initializing', downloading: 'downloading', loading_weights: 'loading weights',
  compiling: 'compiling', kv_cache: 'sizing the cache', capturing_graphs: 'capturing graphs', warming_up: 'warming up',
  took_before: '{seconds} before', retry_in: 'next try in {time}', never: 'never', on_use: 'in use', pinned: 'pinned',
  load: 'Load', again: 'Load again', unload: 'Unload', stop: 'Stop', sleep: 'Sleep', wake: 'Wake', log: 'Log', chat: 'Chat',
  details: 'Details', dismiss: 'Dismiss', cancel: 'Cancel', close: 'Close', action_of: '{action}: {model}',
  stop_title: 'Stop {model}?', stop_body: 'Its memory is given back. The next request for it has to load it again.',
  stop_gone: 'Its memory is given back. Nothing loads it again by itself.',
  stop_busy: '{n} requests are in it. They may finish first.', stop_busy_1: 'One request is in it. It may finish first.',
  stop_loading: 'It is still loading; what it has done so far is lost.', force: 'Do not wait for them: cut them off',
  sleep_title: 'Put {model} to sleep?', sleep_body: 'Requests in it finish first. The next one wakes it in seconds.',
  load_title: 'Load {model}?', load_makes_room: 'There is no room beside what is loaded. For it these will go:', goes_asleep: 'falls asleep',
  goes_away: 'is stopped', load_no_fit: 'It does not fit now: {why}', load_anyway: 'Load all the same', about_seconds: 'It takes about {time}, by experience.',
  create_title: 'Load a model', create_model: 'Model: an id on Hugging Face, or a folder', create_params: 'Flags of vLLM, one a line',
  create_timeout: 'Idle seconds until it is stopped (0: never)', create_bad_line: 'This line is not flag=value: {line}',
  key: 'Key', key_title: 'Enter a key', key_label: 'API key', key_why: 'The server asks for a key. An admin key shows and does everything on this page.',
  key_keep: 'Remember it on this device', key_keep_why: 'Otherwise it is forgotten when this tab closes.', key_use: 'Use it', key_forget: 'Forget the key',
  why: 'Why', because: 'Placed so because', flags: 'Flags', last_error: 'Last error', suggestion: 'Try', id: 'Id', port: 'Port', pid: 'Process', restarts: 'Restarts',
  engine: 'Engine', names: 'Names', created: 'Created',
  requests_s: 'Requests/s', last_hour: 'last hour', now: 'now', peak: 'highest {value}', nothing_yet: 'Nothing in the last hour', other_models: 'others',
  chart_label: '{name} in the last hour: {now} now, {peak} at most. Left and right arrows read the values.', minutes_ago: '−{n} min',
  system: 'System prompt', temperature: 'Temperature', top_p: 'Top-p', max_tokens: 'Longest answer', seed: 'Seed', clear: 'New conversation',
  conversation: 'Conversation', message: 'Message', message_hint: 'Write a message. Enter sends, Shift+Enter begins a line.', send: 'Send', stop_answer: 'Stop',
  you: 'You', thinking: 'Thinking', play_empty: 'Choose a model and say something. A model that is not loaded is loaded for it.',
  play_figures: 'first token {ttft} · {rate} tokens/s · {n} tokens', play_waits: 'waits for the first token', play_stopped: 'stopped', no_chat_models: 'There is no model yet',
  instance: 'Instance', search: 'Search', only_matches: 'Only matches', follow: 'Follow', wrap: 'Wrap lines', log_about: '{n} lines', log_found: '{n} lines, {found} match',
  log_ended: 'the log has ended', log_none: 'There is no instance whose log could be read.', log_lost: 'The connection was lost: {why}',
  requests: 'Requests', only_failed: 'Only failed', filter: 'Filter', time: 'Time', status: 'Status', backend: 'Backend', path: 'Path', first_byte: 'First byte',
  whole: 'Whole', request_id: 'Request id', no_requests: 'No request yet.', under_way: 'under way', events: 'Events', no_events: 'Nothing has happened yet.',
  requests_about: 'the last {n}', event_state: '{model}: {from} → {to}', event_new: '{model}: {to}', event_phase: '{model}: {phase}',
  done: 'Done', failed_do: '{action} failed: {why}', unreachable: 'the server cannot be reached', key_of_nobody: '–',
};

const ZH = {
  skip: '跳到内容', views: '视图', overview: '总览', playground: '试用', logs: '日志', activity: '动态',
  live: '实时', polling: '轮询', offline: '没有连接', refused: '无权访问', connecting: '正在连接',
  theme_auto: '主题：跟随系统', theme_light: '主题：浅色', theme_dark: '主题：深色', other_language: 'English',
  simulated: '引擎是模拟的：没有加载任何模型，所有回答都是编造的。',
  config_error: '磁盘上的配置没有生效：{error}',
  no_management: '这里不能管理：{why}',
  limited: '此密钥只能对话，不能管理：请输入管理密钥来查看实例、日志和动态。',
  devices: '设备', driver: '驱动 {driver}，CUDA {cuda}', host_memory: '主机内存', device: '设备', others: '其他程序',
  free: '共 {total}，空闲 {bytes}', busy: '利用率 {percent}', device_error: '无法读取：{error}',
  models: '模型', models_about: '{all} 个中 {ready} 个就绪', load_other: '加载其他模型', model: '模型', state: '状态',
  memory: '内存', in_flight: '进行中', waiting: '等待中', tokens_s: 'Token/秒', ttft: '首 token', cache: '缓存',
  idle_in: '空闲剩余', actions: '操作', no_models: '没有配置或加载任何模型。请加载一个，或写入 config.yaml。',
  servers: '服务器', server: '服务器', health: '健康', running: '运行中', capacity: '容量', serves: '提供的模型',
  servers_about: '{all} 台中 {up} 台可用', up: '可用', down: '不可用', suspect: '可疑', leaving: '正在退出', unknown: '未知',
  unloaded: '未加载', starting: '加载中', ready: '就绪', falling_asleep: '正在入睡', sleeping: '睡眠', waking: '唤醒中',
  backoff: '稍后重试', stopping: '停止中', stopped: '已停止', failed: '失败', draining: '先完成请求',
  waiting_for_old_instance: '等待前一个实例', waiting_for_memory: '等待内存', waiting_for_device: '等待轮到自己',
  resolving: '解析模型', initializing: '初始化', downloading: '下载', loading_weights: '加载权重',
  compiling: '编译', kv_cache: '确定缓存大小', capturing_graphs: '捕获计算图', warming_up: '预热',
  took_before: '上次 {seconds}', retry_in: '{time}后重试', never: '从不', on_use: '使用中', pinned: '固定',
  load: '加载', again: '重新加载', unload: '卸载', stop: '停止', sleep: '睡眠', wake: '唤醒', log: '日志', chat: '对话',
  details: '详情', dismiss: '移除', cancel: '取消', close: '关闭', action_of: '{action}：{model}',
  stop_title: '停止 {model}？', stop_body: '其内存会被释放。下一个请求需要重新加载它。',
  stop_gone: '其内存会被释放。它不会自动重新加载。',
  stop_busy: '其中有 {n} 个请求，可以先等它们完成。', stop_busy_1: '其中有 1 个请求，可以先等它完成。',
  stop_loading: '它仍在加载，已完成的部分会丢失。', force: '不等待：直接中断它们',
  sleep_title: '让 {model} 睡眠？', sleep_body: '其中的请求先完成。下一个请求会在几秒内唤醒它。',
  load_title: '加载 {model}？', load_makes_room: '已加载的模型旁边没有空间。为它让出空间的有：', goes_asleep: '睡眠',
  goes_away: '停止', load_no_fit: '现在放不下：{why}', load_anyway: '仍然加载', about_seconds: '根据经验约需 {time}。',
  create_title: '加载模型', create_model: '模型：Hugging Face 上的 id，或文件夹', create_params: 'vLLM 的参数，每行一个',
  create_timeout: '空闲多少秒后停止（0：从不）', create_bad_line: '这一行不是 参数=值：{line}',
  key: '密钥', key_title: '输入密钥', key_label: 'API 密钥', key_why: '服务器需要密钥。管理密钥可以查看和操作本页的一切。',
  key_keep: '在此设备上记住', key_keep_why: '否则关闭此标签页后就会忘记。', key_use: '使用', key_forget: '忘记密钥',
  why: '原因', because: '如此放置的原因', flags: '参数', last_error: '最近的错误', suggestion: '可以尝试', id: 'Id', port: '端口', pid: '进程', restarts: '重启次数',
  engine: '引擎', names: '名称', created: '创建于',
  requests_s: '请求/秒', last_hour: '最近一小时', now: '现在', peak: '最高 {value}', nothing_yet: '最近一小时没有数据', other_models: '其他',
  chart_label: '最近一小时的{name}：现在 {now}，最高 {peak}。用左右方向键读取数值。', minutes_ago: '−{n} 分',
  system: '系统提示', temperature: '温度', top_p: 'Top-p', max_tokens: '最长回答', seed: '随机种子', clear: '新对话',
  conversation: '对话', message: '消息', message_hint: '输入消息。Enter 发送，Shift+Enter 换行。', send: '发送', stop_answer: '停止',
  you: '你', thinking: '思考', play_empty: '选择一个模型，说点什么。未加载的模型会为此加载。',
  play_figures: '首 token {ttft} · {rate} token/秒 · {n} 个 token', play_waits: '等待首 token', play_stopped: '已停止', no_chat_models: '还没有模型',
  instance: '实例', search: '搜索', only_matches: '只看匹配', follow: '跟随', wrap: '自动换行', log_about: '{n} 行', log_found: '{n} 行，{found} 行匹配',
  log_ended: '日志已结束', log_none: '没有可以读取日志的实例。', log_lost: '连接已断开：{why}',
  requests: '请求', only_failed: '只看失败', filter: '筛选', time: '时间', status: '状态码', backend: '后端', path: '路径', first_byte: '首字节',
  whole: '总计', request_id: '请求 id', no_requests: '还没有请求。', under_way: '进行中', events: '事件', no_events: '还没有发生任何事。',
  requests_about: '最近 {n} 个', event_state: '{model}：{from} → {to}', event_new: '{model}：{to}', event_phase: '{model}：{phase}',
  done: '完成', failed_do: '{action}失败：{why}', unreachable: '无法连接到服务器', key_of_nobody: '–',
};

export const LANGUAGES = { en: EN, zh: ZH };

let language = 'en';
const listeners = [];

function stored(name) { try { return localStorage.getItem(name); } catch { return null; } }
export function remember(name, value) { try { localStorage.setItem(name, value); } catch { /* storage is off */ } }

export function t(key, values = {}) {
  const text = LANGUAGES[language][key] ?? EN[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? '');
}

export function currentLanguage() { return language; }
export function whenLanguageChanges(listener) { listeners.push(listener); }

export function useLanguage(wanted) {
  language = wanted;
  document.documentElement.lang = wanted === 'zh' ? 'zh-CN' : 'en';
  for (const one of document.querySelectorAll('[data-t]')) one.textContent = t(one.dataset.t);
  for (const one of document.querySelectorAll('[data-t-label]')) one.setAttribute('aria-label', t(one.dataset.tLabel));
  for (const one of document.querySelectorAll('[data-t-placeholder]')) one.placeholder = t(one.dataset.tPlaceholder);
  for (const listener of listeners) listener();
}

export function firstLanguage() {
  const chosen = stored('language');
  if (chosen in LANGUAGES) return chosen;
  return (navigator.languages ?? [navigator.language]).map(one => one.slice(0, 2)).find(one => one in LANGUAGES) ?? 'en';
}
