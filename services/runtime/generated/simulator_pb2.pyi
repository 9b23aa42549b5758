from services.runtime.generated import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Frames(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FRAMES_LAST: _ClassVar[Frames]
    FRAMES_NONE: _ClassVar[Frames]
    FRAMES_ALL: _ClassVar[Frames]
FRAMES_LAST: Frames
FRAMES_NONE: Frames
FRAMES_ALL: Frames

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Camera(_message.Message):
    __slots__ = ("name", "height", "width", "cell")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    CELL_FIELD_NUMBER: _ClassVar[int]
    name: str
    height: int
    width: int
    cell: int
    def __init__(self, name: _Optional[str] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., cell: _Optional[int] = ...) -> None: ...

class Axis(_message.Message):
    __slots__ = ("name", "unit", "low", "high")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    name: str
    unit: str
    low: float
    high: float
    def __init__(self, name: _Optional[str] = ..., unit: _Optional[str] = ..., low: _Optional[float] = ..., high: _Optional[float] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("name", "instruction", "max_chunks")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTION_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    name: str
    instruction: str
    max_chunks: int
    def __init__(self, name: _Optional[str] = ..., instruction: _Optional[str] = ..., max_chunks: _Optional[int] = ...) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("simulator", "cameras", "state", "action", "chunk", "control_hz", "gripper_open_width", "gripper_width_index", "tasks", "environments")
    SIMULATOR_FIELD_NUMBER: _ClassVar[int]
    CAMERAS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CONTROL_HZ_FIELD_NUMBER: _ClassVar[int]
    GRIPPER_OPEN_WIDTH_FIELD_NUMBER: _ClassVar[int]
    GRIPPER_WIDTH_INDEX_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENTS_FIELD_NUMBER: _ClassVar[int]
    simulator: str
    cameras: _containers.RepeatedCompositeFieldContainer[Camera]
    state: _containers.RepeatedCompositeFieldContainer[Axis]
    action: _containers.RepeatedCompositeFieldContainer[Axis]
    chunk: int
    control_hz: float
    gripper_open_width: float
    gripper_width_index: int
    tasks: _containers.RepeatedCompositeFieldContainer[Task]
    environments: int
    def __init__(self, simulator: _Optional[str] = ..., cameras: _Optional[_Iterable[_Union[Camera, _Mapping]]] = ..., state: _Optional[_Iterable[_Union[Axis, _Mapping]]] = ..., action: _Optional[_Iterable[_Union[Axis, _Mapping]]] = ..., chunk: _Optional[int] = ..., control_hz: _Optional[float] = ..., gripper_open_width: _Optional[float] = ..., gripper_width_index: _Optional[int] = ..., tasks: _Optional[_Iterable[_Union[Task, _Mapping]]] = ..., environments: _Optional[int] = ...) -> None: ...

class ResetRequest(_message.Message):
    __slots__ = ("env_id", "task", "split", "index", "wait_seconds")
    ENV_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    env_id: str
    task: str
    split: str
    index: int
    wait_seconds: float
    def __init__(self, env_id: _Optional[str] = ..., task: _Optional[str] = ..., split: _Optional[str] = ..., index: _Optional[int] = ..., wait_seconds: _Optional[float] = ...) -> None: ...

class ResetReply(_message.Message):
    __slots__ = ("env_id", "images", "state", "instruction")
    class ImagesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.Tensor
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...
    ENV_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTION_FIELD_NUMBER: _ClassVar[int]
    env_id: str
    images: _containers.MessageMap[str, _tensor_pb2.Tensor]
    state: _tensor_pb2.Tensor
    instruction: str
    def __init__(self, env_id: _Optional[str] = ..., images: _Optional[_Mapping[str, _tensor_pb2.Tensor]] = ..., state: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., instruction: _Optional[str] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("env_id", "actions")
    ENV_ID_FIELD_NUMBER: _ClassVar[int]
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    env_id: str
    actions: _tensor_pb2.Tensor
    def __init__(self, env_id: _Optional[str] = ..., actions: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class StepRequest(_message.Message):
    __slots__ = ("chunks", "frames")
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    chunks: _containers.RepeatedCompositeFieldContainer[Chunk]
    frames: Frames
    def __init__(self, chunks: _Optional[_Iterable[_Union[Chunk, _Mapping]]] = ..., frames: _Optional[_Union[Frames, str]] = ...) -> None: ...

class ChunkResult(_message.Message):
    __slots__ = ("env_id", "images", "states", "success", "done")
    class ImagesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.Tensor
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...
    ENV_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    env_id: str
    images: _containers.MessageMap[str, _tensor_pb2.Tensor]
    states: _tensor_pb2.Tensor
    success: bool
    done: bool
    def __init__(self, env_id: _Optional[str] = ..., images: _Optional[_Mapping[str, _tensor_pb2.Tensor]] = ..., states: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., success: _Optional[bool] = ..., done: _Optional[bool] = ...) -> None: ...

class StepReply(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[ChunkResult]
    def __init__(self, results: _Optional[_Iterable[_Union[ChunkResult, _Mapping]]] = ...) -> None: ...

class CloseRequest(_message.Message):
    __slots__ = ("env_ids",)
    ENV_IDS_FIELD_NUMBER: _ClassVar[int]
    env_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, env_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class CloseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
