from services.runtime.generated import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PolicyDescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PolicyDescribeReply(_message.Message):
    __slots__ = ("policy", "base_hash", "worldmodel_hash", "adapters_hash", "cameras", "image_height", "image_width", "state_size", "action_size", "chunk", "versions", "max_batch", "horizon", "action_low", "action_high", "cells")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    BASE_HASH_FIELD_NUMBER: _ClassVar[int]
    WORLDMODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_HASH_FIELD_NUMBER: _ClassVar[int]
    CAMERAS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_WIDTH_FIELD_NUMBER: _ClassVar[int]
    STATE_SIZE_FIELD_NUMBER: _ClassVar[int]
    ACTION_SIZE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    HORIZON_FIELD_NUMBER: _ClassVar[int]
    ACTION_LOW_FIELD_NUMBER: _ClassVar[int]
    ACTION_HIGH_FIELD_NUMBER: _ClassVar[int]
    CELLS_FIELD_NUMBER: _ClassVar[int]
    policy: str
    base_hash: str
    worldmodel_hash: str
    adapters_hash: str
    cameras: _containers.RepeatedScalarFieldContainer[str]
    image_height: int
    image_width: int
    state_size: int
    action_size: int
    chunk: int
    versions: _containers.RepeatedScalarFieldContainer[int]
    max_batch: int
    horizon: int
    action_low: _containers.RepeatedScalarFieldContainer[float]
    action_high: _containers.RepeatedScalarFieldContainer[float]
    cells: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, policy: _Optional[str] = ..., base_hash: _Optional[str] = ..., worldmodel_hash: _Optional[str] = ..., adapters_hash: _Optional[str] = ..., cameras: _Optional[_Iterable[str]] = ..., image_height: _Optional[int] = ..., image_width: _Optional[int] = ..., state_size: _Optional[int] = ..., action_size: _Optional[int] = ..., chunk: _Optional[int] = ..., versions: _Optional[_Iterable[int]] = ..., max_batch: _Optional[int] = ..., horizon: _Optional[int] = ..., action_low: _Optional[_Iterable[float]] = ..., action_high: _Optional[_Iterable[float]] = ..., cells: _Optional[_Iterable[int]] = ...) -> None: ...

class Observation(_message.Message):
    __slots__ = ("images", "state", "instruction", "episode", "step")
    class ImagesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.Tensor
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTION_FIELD_NUMBER: _ClassVar[int]
    EPISODE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    images: _containers.MessageMap[str, _tensor_pb2.Tensor]
    state: _tensor_pb2.Tensor
    instruction: str
    episode: str
    step: int
    def __init__(self, images: _Optional[_Mapping[str, _tensor_pb2.Tensor]] = ..., state: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., instruction: _Optional[str] = ..., episode: _Optional[str] = ..., step: _Optional[int] = ...) -> None: ...

class ActRequest(_message.Message):
    __slots__ = ("observations", "namespace", "version")
    OBSERVATIONS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    observations: _containers.RepeatedCompositeFieldContainer[Observation]
    namespace: str
    version: int
    def __init__(self, observations: _Optional[_Iterable[_Union[Observation, _Mapping]]] = ..., namespace: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class ActReply(_message.Message):
    __slots__ = ("base", "residual", "combined", "version", "unseen")
    BASE_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_FIELD_NUMBER: _ClassVar[int]
    COMBINED_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UNSEEN_FIELD_NUMBER: _ClassVar[int]
    base: _tensor_pb2.Tensor
    residual: _tensor_pb2.Tensor
    combined: _tensor_pb2.Tensor
    version: int
    unseen: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, base: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., residual: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., combined: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., version: _Optional[int] = ..., unseen: _Optional[_Iterable[bool]] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("namespace", "version", "uri")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    URI_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    version: int
    uri: str
    def __init__(self, namespace: _Optional[str] = ..., version: _Optional[int] = ..., uri: _Optional[str] = ...) -> None: ...

class LoadReply(_message.Message):
    __slots__ = ("versions",)
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, versions: _Optional[_Iterable[int]] = ...) -> None: ...
